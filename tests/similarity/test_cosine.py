"""Cosines between tokens and between layers against loops over rows."""

import numpy as np
import pytest

from mi_pipe.core.errors import ConfigError
from mi_pipe.core.store import Store
from mi_pipe.similarity.layer_cosine import layer_cosine
from mi_pipe.similarity.token_means import cosine, token_means
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy
from tests.similarity.planted import mapped_store, selections

LENGTHS = [9, 12, 7, 10] * 6


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    return harvest_toy(Store(tmp_path_factory.mktemp("store")), LENGTHS)


def by_token(acts, hook, text, rows):
    table = acts.table(["text"])["text"].astype(str).to_numpy()
    chosen = [row for row in rows if table[row] == text and not acts.massive(hook)[row]]
    return np.mean([acts.read_rows(hook, row, row + 1)[0].astype(np.float64) for row in chosen], axis=0), len(chosen)


@pytest.mark.parametrize("where", [None, "pos > 1"])
def test_means_of_tokens_are_means_of_their_rows(acts, where):
    tokens = [" 3", " 5", " 2"]
    found = token_means(acts, tokens, where=where)
    assert found["mean"].dims == ("hook", "token", "d")
    rows = np.arange(acts.n_rows) if where is None else np.flatnonzero(acts.pos > 1)
    for hook in acts.hooks:
        kept = [row for row in rows if not acts.massive(hook)[row]]
        centre = acts.take(hook, np.array(kept)).astype(np.float64).mean(0)
        for token in tokens:
            mean, n_rows = by_token(acts, hook, token, rows)
            one = found.sel(hook=hook, token=token)
            np.testing.assert_allclose(one["mean"], mean - centre, atol=1e-6)
            assert one["n_rows"] == n_rows


def test_cosines_run_over_tokens_or_over_layers(acts):
    means = token_means(acts, [" 3", " 5"], centred=False)["mean"]
    vectors = means.values
    between = cosine(means, "token").sel(hook=HEADS, token=" 3", other_token=" 5").item()
    a, b = vectors[1]
    assert between == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    over = cosine(means, "hook")
    assert set(over.dims) == {"token", "hook", "other_hook"}
    a, b = vectors[:, 1]
    expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert over.sel(token=" 5", hook=RESIDUAL, other_hook=HEADS).item() == pytest.approx(expected)


def test_tokens_without_rows_and_several_widths_are_refused(acts, store):
    with pytest.raises(ConfigError, match=r"No row of .* is the token '3'. Did you mean ' 3'"):
        token_means(acts, ["3"])
    wide = mapped_store(store, np.random.default_rng(0).normal(size=(20, 5)), selections(2, 3))
    with pytest.raises(ConfigError, match=r"have several \(maps.0 2, maps.1 3\)"):
        layer_cosine(wide)


def test_layers_are_compared_row_by_row(acts):
    found = layer_cosine(acts, where="pos > 0")
    rows = [r for r in range(acts.n_rows) if acts.pos[r] > 0 and not any(acts.massive(h)[r] for h in acts.hooks)]
    x, y = (acts.take(h, np.array(rows)).astype(np.float64) - acts.statistics(h).mean for h in acts.hooks)
    cosines = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    one = found.sel(hook=RESIDUAL, other_hook=HEADS)
    assert one["cosine"].item() == pytest.approx(cosines.mean(), abs=1e-6)
    assert one["low"] < one["cosine"] < one["high"]
    by_prompt = [cosines[acts.prompt_idx[rows] == p].mean() for p in range(acts.n_prompts)]
    expected = 2 * 1.96 * np.std(by_prompt) / np.sqrt(acts.n_prompts)
    assert (one["high"] - one["low"]).item() == pytest.approx(expected, rel=0.35)
    np.testing.assert_allclose(np.diag(found["cosine"]), 1, rtol=1e-5)


def test_one_token_may_be_a_text_and_none_is_counted_twice(acts):
    one, twice = token_means(acts, " 3"), token_means(acts, [" 3", " 5", " 3"])
    assert twice["token"].values.tolist() == [" 3", " 5"]
    np.testing.assert_array_equal(one["mean"].sel(token=" 3"), twice["mean"].sel(token=" 3"))
    with pytest.raises(ConfigError, match="at least one token"):
        token_means(acts, [])
    assert token_means(acts, " 3", hooks=HEADS)["hook"].values.tolist() == [HEADS]
