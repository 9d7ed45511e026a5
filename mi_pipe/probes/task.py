"""One task of probes: labelled rows of one position at one hook point, real and control labels, every kind."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mi_pipe.probes.causal import reading_direction
from mi_pipe.probes.config import ProbeKind, ProbeOptions
from mi_pipe.probes.control import control_labels, n_types, seen_share
from mi_pipe.probes.fitting import PART_NAMES, Fitted, Readable, Rows, Targets, figures_of, fit_probe
from mi_pipe.probes.labels import MISSING, Labels
from mi_pipe.probes.scores import NO_SCORE, difference, predicted_classes
from mi_pipe.probes.split import Parts

_FEWEST_ROWS = 2
_CLASSES_TOLD = 3
_FEWEST_CLASSES = 2


@dataclass(frozen=True)
class ProbeTask:
    """Rows with labels by part; classes that are too rare are gone, and the others numbered anew."""

    rows: Parts
    y: Targets
    classes: tuple[str, ...]
    """Those that are left, in their order; none for regression."""
    types: dict[str, Shaped[np.ndarray, " row"]] | None
    """What control labels are drawn for, by part."""
    cluster: dict[str, Int[np.ndarray, " row"]]


@dataclass(frozen=True)
class TaskResult:
    """What came of one task."""

    probes: list[dict[str, object]]
    """One row a kind: the columns of `probes.parquet` but which task it is."""
    curves: pd.DataFrame
    """kind, control (bool), l2, training, validation."""
    predictions: pd.DataFrame
    """kind, row, target, predicted, score."""
    tensors: dict[ProbeKind, dict[str, Tensor]]


def make_task(
    parts: Parts,
    labels: Labels,
    types: Shaped[np.ndarray, " row"] | None,
    cluster: Int[np.ndarray, " row"],
    options: ProbeOptions,
) -> ProbeTask | str:
    """Return the task of some rows, or why there is none. `types` and `cluster` are by row of the store."""
    kept = {part: rows[labels.is_known[rows]] for part, rows in _by_part(parts).items()}
    classes: tuple[str, ...] = ()
    values = labels.values
    if labels.is_classes:
        chosen = _frequent(values[kept["training"]], options)
        if len(chosen) < _FEWEST_CLASSES:
            return _too_few_classes(values[kept["training"]], labels.classes, options)
        classes = tuple(labels.classes[i] for i in chosen)
        numbers = np.full(len(labels.classes), MISSING, np.int64)
        numbers[chosen] = np.arange(len(chosen))
        values = np.where(values >= 0, numbers[values], MISSING)
        kept = {part: rows[values[rows] != MISSING] for part, rows in kept.items()}
    if min(map(len, kept.values())) < _FEWEST_ROWS:
        return "too few rows have a label"
    y = {part: values[rows] for part, rows in kept.items()}
    # Of numbers that do not vary there is no R²; of classes training rows alone need more than one.
    constant = [part for part in y if len(np.unique(y[part])) < _FEWEST_CLASSES]
    if constant and (not classes or constant[0] == "training"):
        return f"every {constant[0]} row has one label"
    of_types = None if types is None else {part: types[rows] for part, rows in kept.items()}
    return ProbeTask(Parts(**kept), y, classes, of_types, {part: cluster[rows] for part, rows in kept.items()})


def _by_part(parts: Parts) -> dict[str, Int[np.ndarray, " row"]]:
    return {part: getattr(parts, part) for part in PART_NAMES}


def _frequent(values: Int[np.ndarray, " row"], options: ProbeOptions) -> Int[np.ndarray, " label"]:
    """Return the classes with enough training rows, the most frequent if there are too many, ascending."""
    counts = np.bincount(values)
    order = np.argsort(-counts, kind="stable")[: options.max_classes]
    return np.sort(order[counts[order] >= options.min_class_rows])


def _too_few_classes(values: Int[np.ndarray, " row"], classes: tuple[str, ...], options: ProbeOptions) -> str:
    """Say which classes the training rows have, the most frequent first."""
    counts = np.bincount(values, minlength=len(classes))
    order = np.argsort(-counts, kind="stable")[:_CLASSES_TOLD]
    told = ", ".join(f"{counts[i]} {classes[i]}" for i in order if counts[i]) or "none"
    return f"of {len(values)} training rows {told}; two classes of at least {options.min_class_rows} are needed"


def run_task(task: ProbeTask, x: Rows, options: ProbeOptions) -> TaskResult:
    """Fit every kind to the real labels and to the control's, on raw activations `x` by part."""
    data = Readable.of(x)
    control = _control(task, options)
    rows: list[dict[str, object]] = []
    curves, predictions = [], []
    tensors: dict[ProbeKind, dict[str, Tensor]] = {}
    for kind in options.kinds:
        fitted = fit_probe(kind, data, task.y, len(task.classes), options)
        other = None if control is None else fit_probe(kind, data, control, len(task.classes), options)
        found = {"kind": kind, "l2": fitted.l2, **_described(task), **_figures(task, fitted, control, other)}
        curves.append(pd.DataFrame(fitted.curve).assign(kind=kind, control=False))
        if other is not None:
            curves.append(pd.DataFrame(other.curve).assign(kind=kind, control=True))
        predictions.append(_predictions(kind, task, fitted.scores["test"]))
        tensors[kind] = fitted.tensors
        if kind == "linear":
            tensors[kind] |= {"pair": torch.tensor(_two_most_frequent(task))}
            found["deviation"] = _deviation(tensors[kind], x["training"])
        rows.append(found)
    return TaskResult(rows, pd.concat(curves, ignore_index=True), pd.concat(predictions, ignore_index=True), tensors)


def _figures(task: ProbeTask, fitted: Fitted, control: Targets | None, other: Fitted | None) -> dict[str, float]:
    """Return the figures of a probe by part, those of the control's on test rows, and selectivity, with intervals."""
    n_classes = len(task.classes)
    own = figures_of(fitted, task.y, n_classes, task.cluster)
    found = {part: getattr(own, part).value for part in PART_NAMES} | {"low": own.test.low, "high": own.test.high}
    of_control, selectivity = NO_SCORE, NO_SCORE
    if control is not None and other is not None:
        of_control = figures_of(other, control, n_classes, task.cluster).test
        selectivity = difference(own.test, of_control)
    for name, score in (("auc", own.auc), ("control", of_control), ("selectivity", selectivity)):
        found |= {name: score.value, f"{name}_low": score.low, f"{name}_high": score.high}
    return found


def _control(task: ProbeTask, options: ProbeOptions) -> Targets | None:
    if task.types is None:
        return None
    whole = np.concatenate([task.types[part] for part in PART_NAMES])
    drawn = control_labels(whole, task.y["training"], options.seed)
    if drawn is None:
        return None
    edges = np.cumsum([len(task.types[part]) for part in PART_NAMES])[:-1]
    found: Targets = {part: piece for part, piece in zip(PART_NAMES, np.split(drawn, edges), strict=True)}  # noqa: C416
    return found if len(np.unique(found["training"])) > 1 else None


def _two_most_frequent(task: ProbeTask) -> tuple[int, int]:
    """Return the two classes whose logits' difference is the probe's reading; (0, 0) if it has one output."""
    if len(task.classes) <= _FEWEST_CLASSES:
        return 0, 0
    first, second = np.argsort(-np.bincount(task.y["training"]), kind="stable")[:2]
    return int(first), int(second)


def _deviation(tensors: dict[str, Tensor], x: Float[Tensor, "row d"]) -> float:
    """Return the deviation of raw activations along the probe's direction."""
    unit = reading_direction(tensors["weight"], tensors["bias"], tensors["pair"]).unit
    return float((x.double() @ unit.to(x).double()).std(correction=0))


def _described(task: ProbeTask) -> dict[str, object]:
    """Return what the task is made of, and how well the commonest class would do (0 for R²)."""
    n_rows = {f"n_{part}": len(task.y[part]) for part in PART_NAMES}
    majority = 0.0
    if task.classes:
        commonest = np.bincount(task.y["training"]).argmax()
        majority = float((task.y["test"] == commonest).mean())
    types = {"n_types": 0, "types_seen": np.nan}
    if task.types is not None:
        found = task.types
        whole = np.concatenate([found[part] for part in PART_NAMES])
        types = {"n_types": n_types(whole), "types_seen": seen_share(found["training"], found["test"])}
    return {"n_classes": len(task.classes), **n_rows, "majority": majority, **types}


def _predictions(kind: str, task: ProbeTask, scores: np.ndarray) -> pd.DataFrame:
    """Return the test rows; `score`: the predicted class's logit (class 1's of two), or the number."""
    predicted = predicted_classes(scores).astype(float) if task.classes else scores[:, 0]
    best = scores[:, 0] if scores.shape[1] == 1 else scores.max(1)
    frame = {"kind": kind, "row": task.rows.test, "target": task.y["test"].astype(float), "predicted": predicted}
    return pd.DataFrame({**frame, "score": best})


def activations_of(take: Callable[[Int[np.ndarray, " row"]], np.ndarray], parts: Parts, device: torch.device) -> Rows:
    """Return raw activations by part; `take` reads rows of the store."""
    return {part: torch.from_numpy(take(rows)).to(device) for part, rows in _by_part(parts).items()}
