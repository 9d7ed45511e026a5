"""Dataset maximisation against a full sort of all rows, from a store and by running the model."""

import numpy as np
import pytest
import torch

from mi_pipe.core.errors import ConfigError
from mi_pipe.core.store import Store
from mi_pipe.maximisation import dataset
from mi_pipe.maximisation.dataset import dataset_maximisation, model_maximisation
from mi_pipe.maximisation.strongest import Strongest
from mi_pipe.maximisation.targets import Feature, Neuron, Projection, head_output
from mi_pipe.models.head_weights import head_weights
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy, random_prompts
from tests.maximisation.saes import random_sae
from tests.stages.toys import toy_model

LENGTHS = [9, 12, 7, 30] * 8
DIRECTION = torch.linspace(-1, 2, 32)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A store of activations, the model and the prompts they are of."""
    store = Store(tmp_path_factory.mktemp("store"))
    return (
        harvest_toy(store, LENGTHS, store_dtype="float32"),
        toy_model(store).load("cpu"),
        random_prompts(store, LENGTHS),
    )


def written_out(acts, model) -> dict[str, np.ndarray]:
    """The value of each target at every row, by other means."""
    x = acts.read_rows(RESIDUAL, 0, acts.n_rows).astype(np.float64)
    z = acts.read_rows(HEADS, 0, acts.n_rows).astype(np.float64).reshape(acts.n_rows, 4, 8)
    written = z[:, 2] @ head_weights(model, 1).W_O[2].double().numpy()
    sae = random_sae(RESIDUAL)
    pre = (x - sae.b_dec.double().numpy()) @ sae.W_enc.double().numpy() + sae.b_enc.double().numpy()
    kept = np.sort(pre, axis=1)[:, [-4]] <= pre
    return {
        f"{RESIDUAL}[5]": x[:, 5],
        "projection": x @ DIRECTION.double().numpy(),
        f"{HEADS}[head 2]": np.linalg.norm(written, axis=1),
        "random[feature 7]": np.where(kept, np.maximum(pre, 0), 0)[:, 7],
    }


def targets(model):
    return [
        Neuron(RESIDUAL, 5),
        Projection(RESIDUAL, DIRECTION),
        head_output(model, 1, 2),
        Feature(random_sae(RESIDUAL), 7),
    ]


@pytest.mark.parametrize("where", [None, "pos > 3"])
def test_they_are_the_head_of_a_full_sort(toy, monkeypatch, where):
    acts, model, _ = toy
    monkeypatch.setattr(dataset, "_BLOCK_ROWS", 37)
    found = dataset_maximisation(acts, targets(model), k=15, where=where, with_massive=True)
    picked = np.ones(acts.n_rows, bool) if where is None else acts.pos > 3
    for name, values in written_out(acts, model).items():
        lines = found[found["target"] == name]
        order = [row for row in np.lexsort((np.arange(len(values)), -values)) if picked[row]][:15]
        np.testing.assert_allclose(lines["value"], values[order], rtol=1e-4, atol=1e-4)
        if values[order].min() > 0:
            assert lines["row"].tolist() == order
        np.testing.assert_allclose(values[lines["row"]], values[order], rtol=1e-4, atol=1e-4)
        assert lines["rank"].tolist() == list(range(15))


def test_lines_say_where_and_in_what_text(toy):
    acts, _, _ = toy
    found = dataset_maximisation(acts, Neuron(RESIDUAL, 5), k=6, before=2, after=1)
    table = acts.table()
    for line in found.to_dict("records"):
        row = table.iloc[line["row"]]
        assert (line["prompt_idx"], line["pos"], line["token"]) == (row["prompt_idx"], row["pos"], row["text"])
        own = table[table["prompt_idx"] == row["prompt_idx"]]["text"].astype(str).tolist()
        at = line["pos"]
        expected = "".join(own[max(0, at - 2) : at]) + f"«{own[at]}»" + "".join(own[at + 1 : at + 2])
        assert line["context"] == expected


def test_one_row_a_prompt_and_no_massive_ones(toy, monkeypatch):
    acts, _, _ = toy
    monkeypatch.setattr(dataset, "_BLOCK_ROWS", 11)
    values = acts.read_rows(RESIDUAL, 0, acts.n_rows)[:, 5]
    found = dataset_maximisation(acts, Neuron(RESIDUAL, 5), k=10, one_per_prompt=True)
    values[acts.massive(RESIDUAL)] = -np.inf
    best = {p: np.flatnonzero(acts.prompt_idx == p)[values[acts.prompt_idx == p].argmax()] for p in range(len(LENGTHS))}
    expected = sorted(best.values(), key=lambda row: (-values[row], row))[:10]
    assert found["row"].tolist() == expected


def test_a_model_that_runs_finds_what_its_store_has(toy):
    acts, model, prompts = toy
    both = [Neuron(RESIDUAL, 5), head_output(model, 1, 2), Neuron("blocks.1.hook_attn_out", 3)]
    found = model_maximisation(model, prompts, both, k=12, first_pos=2)
    stored = dataset_maximisation(acts, both[:2], k=12, where="pos > 1", with_massive=True)
    ours = found[found["target"].isin([target.name for target in both[:2]])].reset_index(drop=True)
    np.testing.assert_allclose(ours["value"], stored["value"], rtol=1e-5)
    assert (ours[["prompt_idx", "pos", "context"]] == stored[["prompt_idx", "pos", "context"]]).mean().min() > 0.9
    tokens = torch.from_numpy(prompts.prompt(3).astype(np.int64))[None]
    _, cache = model.bridge.run_with_cache(tokens)
    of_prompt = found[(found["target"] == both[2].name) & (found["prompt_idx"] == 3)]
    values = cache["blocks.1.hook_attn_out"][0, of_prompt["pos"].tolist(), 3]
    np.testing.assert_allclose(of_prompt["value"], values, rtol=1e-4)


def test_blocks_in_any_order_give_the_same_with_ties_and_without_nan():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 9, 500).astype(np.float32)
    values[::50] = np.nan
    best = Strongest(40)
    rows = rng.permutation(500)
    for start in range(0, 500, 7):
        part = rows[start : start + 7]
        best.add(part, values[part])
    expected = sorted(np.flatnonzero(~np.isnan(values)), key=lambda row: (-values[row], row))[:40]
    assert best.rows.tolist() == expected
    assert best.values.tolist() == values[expected].tolist()


def test_what_there_is_not_is_refused(toy):
    acts, model, _ = toy
    for target, told in [
        (Neuron(RESIDUAL, 32), r"has values 0 to 31; there is no 32"),
        (Projection(RESIDUAL, torch.ones(5)), r"has 32 values, and the direction 'projection' 5"),
        (Feature(random_sae(RESIDUAL), 99), r"random has features 0 to 23; there is no 99"),
        (Feature(random_sae(RESIDUAL, d_in=16), 0), r"reads vectors of width 16"),
    ]:
        with pytest.raises(ConfigError, match=told):
            dataset_maximisation(acts, target)
    with pytest.raises(ConfigError, match="heads 0 to 3; there is no 4"):
        head_output(model, 1, 4)
    with pytest.raises(ConfigError, match="k is 0"):
        dataset_maximisation(acts, Neuron(RESIDUAL, 1), k=0)
    with pytest.raises(ConfigError, match="nothing to maximise"):
        dataset_maximisation(acts, [])


def test_targets_of_one_name_are_refused(toy):
    acts, _, _ = toy
    with pytest.raises(ConfigError, match="Several targets are called 'projection'"):
        dataset_maximisation(acts, [Projection(RESIDUAL, DIRECTION), Projection(RESIDUAL, -DIRECTION)])
