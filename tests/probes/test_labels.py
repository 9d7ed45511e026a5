"""Labels of a user's own that are missing, mixed or made by failing code are refused in one sentence."""

import numpy as np
import pandas as pd
import pytest
import torch

from mi_pipe.activations.harvest.capture import capture
from mi_pipe.core.errors import ConfigError
from mi_pipe.core.store import Store
from mi_pipe.probes.config import LabelConfig
from mi_pipe.probes.labels import MISSING, labels_of

N = 30


@pytest.fixture(scope="module")
def acts(tmp_path_factory):
    rows = np.random.default_rng(0).normal(size=(N, 4)).astype(np.float32)
    return capture(torch.nn.Sequential(torch.nn.Identity()), rows, ["0"], Store(tmp_path_factory.mktemp("store")))


def mixed(rows: pd.DataFrame) -> np.ndarray:
    return np.array(["a", 1] * (len(rows) // 2), dtype=object)


def failing(rows: pd.DataFrame) -> pd.Series:
    return rows["no_such_column"]


def of_table(acts, folder, labels, rows=None):
    path = folder / "labels.parquet"
    pd.DataFrame({"row": np.arange(N) if rows is None else rows, "label": labels}).to_parquet(path)
    return labels_of(acts, "mine", LabelConfig(table=path))


@pytest.mark.parametrize("name", ["mixed", "failing"])
def test_a_function_that_fails_or_mixes_kinds_is_told(acts, name):
    match = {"mixed": "mine: classes have to be .* of one kind", "failing": "failed: KeyError: 'no_such_column'"}[name]
    with pytest.raises(ConfigError, match=match):
        labels_of(acts, "mine", LabelConfig(function=f"{__name__}:{name}"))


def test_labels_that_are_missing_everywhere_are_told(acts, tmp_path):
    for labels, rows in ((np.full(N, np.nan), None), (["a", "b"] * (N // 2), np.arange(N) + 1000)):
        with pytest.raises(ConfigError, match="mine is missing at every row"):
            of_table(acts, tmp_path, labels, rows)


def test_keys_that_are_no_numbers_are_told(acts, tmp_path):
    with pytest.raises(ConfigError, match="row have to be whole numbers"):
        of_table(acts, tmp_path, ["a", "b"] * (N // 2), [str(i) for i in range(N)])


def test_gaps_stay_gaps(acts, tmp_path):
    found = of_table(acts, tmp_path, [None, "b", "a"] * (N // 3))
    assert found.classes == ("a", "b")
    np.testing.assert_array_equal(found.values, [MISSING, 1, 0] * (N // 3))
    numbers = of_table(acts, tmp_path, [0.5, np.nan, 1.25] * (N // 3))
    assert not numbers.is_classes
    np.testing.assert_array_equal(numbers.is_known, [True, False, True] * (N // 3))
