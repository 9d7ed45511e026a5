"""What is read of planted directions, and what only memory could read."""

import numpy as np
import pytest
import torch

from mi_pipe.probes.config import MLPConfig, ProbeOptions
from mi_pipe.probes.labels import Labels
from mi_pipe.probes.split import Parts
from mi_pipe.probes.task import ProbeTask, activations_of, make_task, run_task

N, D, N_TYPES = 6000, 40, 150
PARTS = Parts(np.arange(0, 4000), np.arange(4000, 5000), np.arange(5000, N))


def planted(seed: int = 0):
    """Rows of types at random places, with a class and a number written along two directions."""
    rng = np.random.default_rng(seed)
    types = rng.integers(0, N_TYPES, N)
    classes, number = rng.integers(0, 2, N), rng.normal(size=N)
    first, second = np.linalg.qr(rng.normal(size=(D, 2)))[0].T
    rows = rng.normal(size=(N_TYPES, D))[types] + np.outer(8.0 * classes, first) + np.outer(6 * number, second)
    return rows.astype(np.float32), types, classes, number, first, second


def probed(labels: Labels, options: ProbeOptions):
    rows, types, *_ = planted()
    task = make_task(PARTS, labels, types, np.arange(N) // 4, options)
    assert isinstance(task, ProbeTask)
    return run_task(task, activations_of(lambda some: rows[some], task.rows, torch.device("cpu")), options)


def test_a_linear_probe_is_selective_and_a_large_mlp_is_not():
    _, _, classes, _, first, _ = planted()
    mlp = MLPConfig(hidden=256, n_epochs=80, batch_rows=128, l2=(1e-6,), lr=3e-3)
    found = probed(Labels(classes, ("no", "yes")), ProbeOptions(kinds=("linear", "mlp"), mlp=mlp))
    linear, memorising = found.probes
    assert linear["test"] > 0.98
    assert memorising["test"] > 0.98
    assert linear["selectivity"] > 0.1
    assert memorising["control"] > 0.97
    assert abs(memorising["selectivity"]) < 0.03
    direction = found.tensors["linear"]["weight"][0].numpy()
    assert direction @ first / np.linalg.norm(direction) > 0.8


def test_a_planted_number_is_regressed():
    *_, number, _, second = planted()
    found = probed(Labels(number), ProbeOptions())
    row = found.probes[0]
    assert row["test"] > 0.97
    assert row["low"] < row["test"] < row["high"]
    assert row["control"] < 0.5
    weight = found.tensors["linear"]["weight"][0].numpy()
    assert weight @ second == pytest.approx(1 / 6, rel=0.1)
    assert row["deviation"] == pytest.approx(np.std(planted()[0][:4000] @ (weight / np.linalg.norm(weight))), rel=1e-4)


def test_rare_classes_are_left_out_and_the_others_numbered_anew():
    values = np.zeros(N, np.int64)
    values[::3], values[1::3] = 2, 3
    values[:3] = 1
    labels = Labels(values, ("a", "rare", "b", "c"))
    task = make_task(PARTS, labels, None, np.arange(N), ProbeOptions(min_class_rows=5))
    assert isinstance(task, ProbeTask)
    assert task.classes == ("a", "b", "c")
    assert 0 not in task.rows.training[:1]
    assert (values[task.rows.test] == np.array([0, 2, 3])[task.y["test"]]).all()
    two = make_task(PARTS, labels, None, np.arange(N), ProbeOptions(max_classes=2))
    assert isinstance(two, ProbeTask)
    assert len(two.classes) == 2
    reason = make_task(PARTS, labels, None, np.arange(N), ProbeOptions(min_class_rows=5000))
    counts = np.bincount(values[PARTS.training])
    assert isinstance(reason, str)
    assert reason.startswith(f"of {len(PARTS.training)} training rows {counts.max()} ")
    assert f" {counts[0]} a" in reason
    assert reason.endswith("; two classes of at least 5000 are needed")


@pytest.mark.parametrize("part", ["training", "validation", "test"])
def test_numbers_that_do_not_vary_are_not_regressed(part):
    values = np.random.default_rng(0).normal(size=N)
    values[getattr(PARTS, part)] = 0.5
    assert make_task(PARTS, Labels(values), None, np.arange(N), ProbeOptions()) == f"every {part} row has one label"
