"""Linear probes against scikit-learn's solvers, and what no probe may do."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from mi_pipe.probes.basis import fit_basis
from mi_pipe.probes.config import MLPConfig, ProbeOptions
from mi_pipe.probes.fitting import Readable, fit_probe
from mi_pipe.probes.logistic import solve_logistic
from mi_pipe.probes.ridge import solve_ridge

PENALTIES = (1e-3, 0.1, 10.0)


def rows(n: int, d: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(n, d)) @ rng.normal(size=(d, d))
    return (mixed * np.geomspace(0.01, 100, d) + rng.normal(size=d) * 50).astype(np.float32)


@pytest.mark.parametrize(("n", "d"), [(300, 20), (40, 60)])
@pytest.mark.parametrize("n_classes", [2, 4])
def test_logistic_regression_is_scikit_learns(n, d, n_classes):
    x = rows(n, d)
    rng = np.random.default_rng(1)
    y = np.argmax(StandardScaler().fit_transform(x)[:, :n_classes] + rng.normal(size=(n, n_classes)), axis=1)
    basis = fit_basis(torch.from_numpy(x))
    z = basis.coordinates(torch.from_numpy(x))
    standard = StandardScaler().fit_transform(x.astype(np.float64))
    for found in solve_logistic(z, torch.from_numpy(y), n_classes, PENALTIES, basis.variance):
        peer = LogisticRegression(C=1 / (n * found.l2), tol=1e-10, max_iter=20_000).fit(standard, y)
        mine = (found.weight @ basis.axes.T).numpy()
        np.testing.assert_allclose(mine, peer.coef_, rtol=1e-3, atol=2e-5)
        # Biases of a softmax are free up to a constant.
        np.testing.assert_allclose(np.diff(found.bias.numpy()), np.diff(peer.intercept_), rtol=1e-3, atol=1e-4)
        raw, bias = basis.unfold(found.weight, found.bias)
        logits = torch.from_numpy(x).double() @ raw.T + bias
        torch.testing.assert_close(logits, found.scores(z), rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize(("n", "d"), [(300, 20), (40, 60)])
def test_ridge_is_scikit_learns(n, d):
    x = rows(n, d)
    y = StandardScaler().fit_transform(x)[:, :3].sum(1) * 7 + 100 + np.random.default_rng(2).normal(size=n)
    basis = fit_basis(torch.from_numpy(x))
    z = basis.coordinates(torch.from_numpy(x))
    standard = StandardScaler().fit_transform(x.astype(np.float64))
    for found in solve_ridge(z, torch.from_numpy(y), PENALTIES, basis.variance):
        peer = Ridge(alpha=n * found.l2).fit(standard, y)
        np.testing.assert_allclose((found.weight @ basis.axes.T).numpy()[0], peer.coef_, rtol=1e-6, atol=1e-8)
        assert float(found.bias) == pytest.approx(peer.intercept_)


def split(x, y):
    parts = {"training": slice(0, 300), "validation": slice(300, 400), "test": slice(400, None)}
    return {name: torch.from_numpy(x[at]) for name, at in parts.items()}, {name: y[at] for name, at in parts.items()}


def test_an_mlp_reads_what_no_linear_probe_can():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2000, 6)).astype(np.float32)
    y = ((x[:, 0] > 0) ^ (x[:, 1] > 0)).astype(np.int64)
    parts, target = split(x, y)
    parts["test"], target["test"] = torch.from_numpy(x[400:]), y[400:]
    options = ProbeOptions(kinds=("linear", "mlp"), mlp=MLPConfig(n_epochs=150, hidden=64, batch_rows=64, l2=(1e-4,)))
    data = Readable.of(parts)
    right = {}
    for kind in options.kinds:
        scores = fit_probe(kind, data, target, 2, options).scores["test"]
        right[kind] = ((scores[:, 0] > 0) == target["test"]).mean()
    assert right["linear"] < 0.6
    assert right["mlp"] > 0.85


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@pytest.mark.parametrize("n_classes", [0, 2, 3])
def test_saved_tensors_read_raw_activations_as_the_probe_did(kind, n_classes):
    x = rows(500, 12)
    y = x[:, 0].astype(np.float64) if n_classes == 0 else np.random.default_rng(3).integers(0, n_classes, 500)
    parts, target = split(x, y)
    found = fit_probe(kind, Readable.of(parts), target, n_classes, ProbeOptions(mlp=MLPConfig(n_epochs=3)))
    t, raw = found.tensors, parts["test"]
    made = (
        raw @ t["weight"].T + t["bias"]
        if kind == "linear"
        else (raw @ t["w1"].T + t["b1"]).relu() @ t["w2"].T + t["b2"]
    )
    np.testing.assert_allclose(
        made.numpy(), found.scores["test"], rtol=2e-3, atol=2e-3 * np.abs(found.scores["test"]).max()
    )
    assert (
        fit_probe(kind, Readable.of(parts), target, n_classes, ProbeOptions(mlp=MLPConfig(n_epochs=3))).l2 == found.l2
    )


def test_validation_chooses_a_strong_penalty_where_there_is_nothing_to_read():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(500, 200)).astype(np.float32), rng.integers(0, 2, 500)
    parts, target = split(x, y)
    found = fit_probe("linear", Readable.of(parts), target, 2, ProbeOptions())
    assert found.l2 >= 1
    weak, strong = found.curve[0], found.curve[-1]
    assert weak["training"] < 0.1 < 0.5 < strong["training"]
    assert weak["validation"] > strong["validation"]
