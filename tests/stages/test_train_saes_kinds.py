"""Trainings beyond the plain sweep: every architecture, transcoders, crosscoders, two models, workers, going on."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

from flows.pools import DaskPool, cluster
from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.errors import ConfigError
from mi_pipe.core.stage import execute
from mi_pipe.core.store import Store
from mi_pipe.models.source import load_source
from mi_pipe.saes.sae_set import SAESet
from stages import train_saes
from tests.saes.test_training import ARCHITECTURES
from tests.stages.sae_toy import FIRST, SECOND, sae_inputs, toy_config


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    torch.set_num_threads(1)
    return Store(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def inputs(shared):
    return sae_inputs(shared)


def trained(store, inputs, **changes) -> SAESet:
    return SAESet(execute(train_saes.STAGE, toy_config(**changes), inputs, store).artifact.path)


@pytest.fixture(scope="module")
def every(shared, inputs) -> SAESet:
    return trained(shared, inputs, hooks=[SECOND], architecture=list(ARCHITECTURES), n_tokens=256 * 300)


def test_every_architecture_comes_near_its_sparsity_and_explains(every):
    rows = every.evaluation.set_index("sae")
    for name in every.names:
        assert rows.loc[name, "l0"] == pytest.approx(4, rel=0.25), name
        # An L1 penalty that leaves 4 features of 64 shrinks those; the others lose less.
        is_shrunk = "standard" in name or "p_anneal" in name
        assert rows.loc[name, "fvu"] < (0.9 if is_shrunk else 0.6), name
        assert rows.loc[name, "dead_fraction"] < 0.2, name
        assert 0.5 < rows.loc[name, "ce_recovered"] <= 1.001, name
        assert rows.loc[name, "kl"] > 0, name


def test_every_saved_sae_gives_its_evaluation(every, inputs):
    """FVU, L0, relative bias and MSE by their definitions, from the saved SAE and the store alone."""
    store = inputs.activations
    _, held_out = store.prompt_split(0.1, 0)
    x = torch.from_numpy(store.take(SECOND, np.flatnonzero(held_out & ~store.massive(SECOND)))).double()
    for name in every.names:
        row, sae = every.evaluation.set_index("sae").loc[name], every[name]
        z = sae.encode(x.float())
        made = sae(x.float()).double()
        error = (x - made).square().sum()
        assert row["n_rows"] == len(x)
        assert row["fvu"] == pytest.approx(float(error / (x - x.mean(0)).square().sum()), rel=1e-4), name
        assert row["l0"] == pytest.approx(float((z > 0).sum(1).double().mean())), name
        assert row["mse"] == pytest.approx(float(error / x.numel()), rel=1e-4), name
        assert row["relative_bias"] == pytest.approx(float(made.square().sum() / (made * x).sum()), rel=1e-4), name
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(sae.d_sae), rtol=1e-4, atol=1e-4)


def test_curves_and_held_out_moments_are_there(every):
    assert list(every.held_out.groupby("sae")["step"].apply(list).iloc[0]) == [38, 75, 112, 150, 188, 225, 262, 300]
    densities = every.densities.groupby(["sae", "step"])["n_features"].sum()
    assert set(densities) == {64}
    last = every.held_out[every.held_out["step"] == 300].set_index("sae")["fvu"]
    assert np.allclose(last, every.evaluation.set_index("sae")["fvu"], rtol=0.05)
    assert (every.timing["waiting_share"] < 1).all()
    assert "timing.parquet" in [name for name, entry in every.manifest.files.items() if entry.volatile]


def test_a_transcoder_makes_one_hook_point_of_another(shared, inputs):
    place = f"{FIRST} -> {SECOND}"
    saes = trained(shared, inputs, hooks=[place], architecture="topk", skip=True, n_tokens=256 * 300)
    (name,) = saes.names
    assert name == "L0.resid_post_to_L1.resid_post.topk.k4.d64.s0"
    sae, row = saes[name], saes.evaluation.iloc[0]
    assert (sae.hook, sae.hook_out, sae.sites.kind, sae.subtract_b_dec) == (FIRST, SECOND, "transcoder", False)
    assert sae.W_skip is not None
    store = inputs.activations
    x, y = (torch.from_numpy(store.read_rows(hook, 0, 800)) for hook in (FIRST, SECOND))
    fvu = float((y - sae(x)).square().sum() / (y - y.mean(0)).square().sum())
    assert fvu == pytest.approx(row["fvu"], rel=0.3)
    assert fvu < 0.5
    seen = {}
    edits = {FIRST: lambda value: seen.update(x=value), SECOND: lambda value: sae(seen["x"])}
    assert row["ce_sae"] == pytest.approx(plain_loss(inputs, row["n_prompts"], [edits]), rel=1e-4)


def plain_loss(inputs, n_prompts: int, passes: list) -> float:
    """The mean loss of the last of some passes over held-out prompts, one prompt at a time."""
    model, store = load_source(inputs.model, "cpu"), inputs.activations
    held_out = np.flatnonzero(store.held_out_prompts(0.1, 0))
    total = n = 0
    for i in held_out[np.linspace(0, len(held_out) - 1, min(int(n_prompts), len(held_out))).astype(int)]:
        tokens = torch.tensor(inputs.prompts.prompt(int(i))).long()
        for edits in passes:
            with model.edited(edits), torch.no_grad():
                log_probs = model.logits(tokens[None])[0].double().log_softmax(-1)
        total -= sum(float(log_probs[t, tokens[t + 1]]) for t in range(len(tokens) - 1))
        n += len(tokens) - 1
    return total / n


def test_a_crosscoder_reads_and_writes_several_hook_points(shared, inputs):
    saes = trained(shared, inputs, hooks=[f"{FIRST} + {SECOND}"], architecture=["topk", "standard"], n_tokens=256 * 300)
    store = inputs.activations
    x = torch.cat([torch.from_numpy(store.read_rows(hook, 0, 800)) for hook in (FIRST, SECOND)], dim=1)
    for name in saes.names:
        sae, row = saes[name], saes.evaluation.set_index("sae").loc[name]
        assert (sae.sites.kind, sae.d_in, sae.d_out) == ("crosscoder", 64, 64)
        fvu = float((x - sae(x)).square().sum() / (x - x.mean(0)).square().sum())
        assert fvu == pytest.approx(row["fvu"], rel=0.3)
        assert list(sae.by_output(sae(x))) == [FIRST, SECOND]
        assert sae.decoder_norms().shape == (64, 2)
        assert row["ce_sae"] == pytest.approx(crosscoder_loss(inputs, sae, row["n_prompts"]), rel=1e-4)


def crosscoder_loss(inputs, sae, n_prompts: int) -> float:
    """The mean over hook points of the loss with that one replaced by what the crosscoder makes of both, left alone."""
    seen = {}
    watch = {hook: (lambda value, hook=hook: seen.__setitem__(hook, value)) for hook in (FIRST, SECOND)}

    def replaced(hook):
        return {hook: lambda value: sae.by_output(sae(torch.cat([seen[FIRST], seen[SECOND]], dim=-1)))[hook]}

    return float(np.mean([plain_loss(inputs, n_prompts, [watch, replaced(hook)]) for hook in (FIRST, SECOND)]))


def test_two_models_of_the_same_tokens_share_a_crosscoder(shared, inputs):
    both = train_saes.Inputs(inputs.model, inputs.prompts, inputs.activations, other=inputs.activations)
    saes = trained(shared, both, hooks=[f"{FIRST} + other:{FIRST}"], architecture="topk", other_store="x")
    sae = saes[saes.names[0]]
    assert saes.names[0].startswith("L0.resid_post_and_other.L0.resid_post.")
    norms = sae.decoder_norms()
    # The two "models" are one: whatever a feature writes at the first it writes at the second as well.
    assert torch.corrcoef(norms.T)[0, 1] < 1.01
    assert np.isnan(saes.evaluation["ce_recovered"].iloc[0])
    x = torch.from_numpy(inputs.activations.read_rows(FIRST, 0, 800))
    first, second = sae.by_output(sae(torch.cat([x, x], dim=1))).values()
    fvu = [float((x - part).square().sum() / (x - x.mean(0)).square().sum()) for part in (first, second)]
    assert max(fvu) < 0.7


def test_a_store_of_other_tokens_is_refused(shared, inputs, tmp_path):
    elsewhere = Store(tmp_path / "elsewhere")
    from mi_pipe.prompts.prompt_set import PromptSet
    from mi_pipe.prompts.repeated import RepeatedConfig
    from stages import generate_prompts, harvest

    config = RepeatedConfig(n_prompts=80, length=40, max_period=12, seed=1)
    made = execute(generate_prompts.STAGE, config, generate_prompts.Inputs(inputs.model), elsewhere).artifact
    wanted = harvest.HarvestConfig(hooks=[FIRST], precision="float32", device="cpu", store_dtype="float32")
    read = harvest.Inputs(inputs.model, PromptSet(made.path))
    other = ActivationStore(execute(harvest.STAGE, wanted, read, elsewhere).artifact.path)
    both = train_saes.Inputs(inputs.model, inputs.prompts, inputs.activations, other=other)
    with pytest.raises(ConfigError, match="other tokens"):
        trained(elsewhere, both, hooks=[f"{FIRST} + other:{FIRST}"], other_store="x")


def test_two_workers_make_the_bytes_of_one_process(shared, inputs, every, tmp_path):
    elsewhere = Store(tmp_path / "pool")
    config = toy_config(hooks=[SECOND], architecture=list(ARCHITECTURES), n_tokens=256 * 300)
    with cluster(2, None) as address:
        pool = DaskPool(address)
        found = execute(train_saes.STAGE, config, inputs, elsewhere, pool=pool).artifact
        pool.close()
    assert found.digest == every.digest


def test_several_devices_make_the_bytes_of_one(inputs, every, tmp_path):
    config = toy_config(hooks=[SECOND], architecture=list(ARCHITECTURES), n_tokens=256 * 300, device="cpu,cpu")
    assert execute(train_saes.STAGE, config, inputs, Store(tmp_path / "devices")).artifact.digest == every.digest


CONSTANT = {
    "hooks": [FIRST],
    "architecture": ["topk", "standard", "jumprelu"],
    "optimisation": {"lr": 1e-3, "warmup_steps": 0, "decay_fraction": 0},
    "sparsity": {"warmup_fraction": 0, "coefficient": 2.0},
    "jumprelu": {"loss": "step"},
    "dead_features": {"window_tokens": 1000},
}


def test_a_continued_training_equals_one_that_never_stopped(shared, inputs):
    """With a constant rate nothing depends on where the end is, so the bits have to be the same."""
    short = trained(shared, inputs, **CONSTANT, n_tokens=256 * 40)
    whole = trained(shared, inputs, **CONSTANT, n_tokens=256 * 90)
    going_on = train_saes.Inputs(inputs.model, inputs.prompts, inputs.activations, start=short)
    continued = trained(shared, going_on, **CONSTANT, n_tokens=256 * 90, start_from=short.id)
    assert continued.id not in (whole.id, short.id)
    assert continued.training["step"].min() > 40
    for name in whole.names:
        for tensor in ("W_enc", "W_dec", "b_enc", "b_dec"):
            assert torch.equal(getattr(whole[name], tensor), getattr(continued[name], tensor)), (name, tensor)
    assert continued.manifest.inputs["start"].id == short.id


def test_a_training_cannot_go_on_from_one_that_does_not_fit(shared, inputs):
    short = trained(shared, inputs, **CONSTANT, n_tokens=256 * 40)
    going_on = train_saes.Inputs(inputs.model, inputs.prompts, inputs.activations, start=short)
    with pytest.raises(ConfigError, match="ask for more"):
        trained(shared, going_on, **CONSTANT, n_tokens=256 * 40, start_from=short.id)
    wider = {**CONSTANT, "jumprelu": {"loss": "step", "bandwidth": 0.2}}
    with pytest.raises(ConfigError, match="was trained with other jumprelu"):
        trained(shared, going_on, **wider, n_tokens=256 * 90, start_from=short.id)
    with pytest.raises(ConfigError, match="Give the same options"):
        trained(shared, going_on, **{**CONSTANT, "architecture": "topk", "k": 5}, start_from=short.id)


def test_a_training_that_is_asked_to_end_saves_itself_first(shared, inputs, every, tmp_path):
    """No periodic checkpoint is due: what is kept was saved when SIGTERM came."""
    command = [sys.executable, "-m", "tests.stages.sae_toy", str(tmp_path / "store"), "0.02", "1000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert process.stdout is not None
    assert any(line == "step 17\n" for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    process.stdout.read()
    assert process.wait(timeout=20) == -signal.SIGTERM
    store = Store(tmp_path / "store")
    scratch = store.root / ".work"
    (checkpoint,) = scratch.glob("**/checkpoint.json")
    assert 17 < json.loads(checkpoint.read_text())["step"] < 60
    resumed = execute(train_saes.STAGE, toy_config(checkpoint_s=1e6), sae_inputs(store), store)
    assert resumed.outcome == "Resumed"
    alone = execute(train_saes.STAGE, toy_config(), inputs, shared)
    assert SAESet(resumed.artifact.path).training.equals(SAESet(alone.artifact.path).training)
    assert resumed.artifact.digest == alone.artifact.digest
