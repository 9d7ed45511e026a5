"""Figures by token and by hook point: equal to NumPy and pandas on all rows at once."""

import numpy as np
import pandas as pd
import pytest

from mi_pipe.activations import summaries
from mi_pipe.core.errors import ConfigError
from mi_pipe.core.store import Store
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy

LENGTHS = [20] * 12 + [33, 7, 7, 20, 64, 1, 40]


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("summaries"))
    fields = {"precision": "float32", "store_dtype": "float32", "massive_factor": 1.2, "covariance": "always"}
    return harvest_toy(store, LENGTHS, **fields)


@pytest.mark.parametrize("where", [None, "pos > 4 and token_id < 40"])
def test_by_token_is_a_groupby_over_all_rows(acts, where, monkeypatch):
    monkeypatch.setattr(summaries, "_BLOCK_ROWS", 17)
    found = acts.by_token(RESIDUAL, where)
    values = acts.read_rows(RESIDUAL, 0, acts.n_rows).astype(np.float64)
    table = acts.table().assign(
        norm=np.linalg.norm(values, axis=1),
        distance=np.linalg.norm(values - acts.statistics(RESIDUAL).mean, axis=1),
        massive=acts.massive(RESIDUAL),
    )
    picked = table if where is None else table.query(where)
    assert picked["massive"].any()
    plain = picked[~picked["massive"]].groupby("token_id")
    by_token = picked.groupby("token_id")
    assert found.index.name == "token_id"
    assert found["n_rows"].is_monotonic_decreasing
    found = found.sort_index()
    assert found.index.tolist() == sorted(by_token.groups)
    np.testing.assert_array_equal(found["n_rows"], by_token.size())
    np.testing.assert_array_equal(found["n_massive"], by_token["massive"].sum())
    assert found["text"].tolist() == by_token["text"].first().astype(str).tolist()
    for column, expected in [
        ("mean_norm", plain["norm"].mean()),
        ("std_norm", plain["norm"].std(ddof=0)),
        ("max_norm", plain["norm"].max()),
        ("mean_distance", plain["distance"].mean()),
    ]:
        np.testing.assert_allclose(found[column], expected.reindex(found.index), rtol=1e-6, atol=1e-7)


def test_the_mean_leaves_massive_rows_out(acts, monkeypatch):
    monkeypatch.setattr(summaries, "_BLOCK_ROWS", 17)
    values = acts.read_rows(HEADS, 0, acts.n_rows).astype(np.float64)
    kept = ~acts.massive(HEADS)
    np.testing.assert_allclose(acts.mean(HEADS), values[kept].mean(0), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(acts.mean(HEADS), acts.statistics(HEADS).mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        acts.mean(HEADS, "pos == 3"), values[kept & (acts.pos == 3)].mean(0), rtol=1e-12, atol=1e-14
    )
    with pytest.raises(ConfigError, match="No row"):
        acts.mean(HEADS, "pos == 1000")
    with pytest.raises(ConfigError, match="No row"):
        acts.mean(HEADS, "massive")


def test_by_layer_is_what_numpy_says_of_all_rows(acts):
    table = acts.by_layer()
    assert table.index.tolist() == [RESIDUAL, HEADS]
    assert table["layer"].tolist() == [0, 1]
    assert table["kind"].tolist() == ["resid_post", "attn.z"]
    assert table["width"].tolist() == [32, 32]
    for hook in acts.hooks:
        values = acts.read_rows(hook, 0, acts.n_rows).astype(np.float64)
        norms = np.linalg.norm(values, axis=1)
        kept = values[~acts.massive(hook)]
        variance = kept.var(0)
        eigenvalues = np.linalg.eigvalsh(np.cov(kept.T, ddof=0))
        line = table.loc[hook]
        assert line["n_rows"] + line["n_massive"] == acts.n_rows
        expected = {
            "median_norm": np.median(norms),
            "mean_norm": norms[~acts.massive(hook)].mean(),
            "rms_norm": np.sqrt((kept**2).sum(1).mean()),
            "max_norm": norms.max(),
            "total_variance": variance.sum(),
            "mean_share": (kept.mean(0) ** 2).sum() / (kept**2).sum(1).mean(),
            "effective_dimensions": variance.sum() ** 2 / (variance**2).sum(),
            "participation": eigenvalues.sum() ** 2 / (eigenvalues**2).sum(),
            "largest_dimension": variance.argmax(),
            "largest_share": variance.max() / variance.sum(),
        }
        np.testing.assert_allclose(line[list(expected)].to_numpy(float), list(expected.values()), rtol=1e-6)


def test_effective_dimensions_of_five_numbers():
    """Variances 4, 1, 1, 1, 1: (4 + 4)² / (16 + 4) = 3.2; the largest dimension has half of the variance."""
    from mi_pipe.activations.statistics import HookStatistics

    known = dict.fromkeys(HookStatistics.__dataclass_fields__, 1.0)
    variance = np.array([1.0, 4.0, 1.0, 1.0, 1.0])
    known |= {"mean": np.array([2.0, 0, 0, 0, 0]), "variance": variance}
    known |= {"covariance": None, "mean_square_norm": 12.0, "mean_square_norm_centred": 8.0}
    figures = summaries._figures(HookStatistics(**known))
    assert figures["effective_dimensions"] == pytest.approx(3.2)
    assert (figures["largest_dimension"], figures["largest_share"]) == (1, 0.5)
    assert figures["mean_share"] == pytest.approx(4 / 12)
    assert figures["total_variance"] == 8.0
    assert np.isnan(figures["participation"])
    # Eigenvalues 3 and 1 beside three zeros, off the axes: (3 + 1)² / (9 + 1) = 1.6.
    covariance = np.zeros((5, 5))
    covariance[:2, :2] = [[2, 1], [1, 2]]
    assert summaries._figures(HookStatistics(**known | {"covariance": covariance}))["participation"] == 1.6


def test_tables_are_frames(acts):
    assert isinstance(acts.by_layer(), pd.DataFrame)
    assert acts.by_token(RESIDUAL)["n_rows"].sum() == acts.n_rows
