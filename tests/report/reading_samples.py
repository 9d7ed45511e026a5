"""Published artifacts of the stages `lenses` and `probes`, made of the samples' hostile text."""

import numpy as np
import pandas as pd
import torch
import xarray as xr

from mi_pipe.core.workspace import Workspace

CHOICES = ("next", "answer", "wrong")
HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]
KINDS = ["linear", "mlp"]


def write_lenses(work: Workspace, tokens: list[str], n_prompts: int) -> dict:
    """Write readings of two depths and the model's own by both lenses; the last prompt is two tokens shorter."""
    draw, n_pos, n_depths = np.random.default_rng(0), len(tokens), 3
    shape = (2, n_prompts, n_depths, n_pos)
    token_id = np.tile(np.arange(n_pos, dtype=np.int32), (n_prompts, 1))
    token_id[-1, -2:] = -1
    missing = np.zeros(shape, bool)
    missing[:, -1, :, -2:] = missing[1, :, -1] = True
    floats = {name: draw.random(shape).astype(np.float32) for name in ("entropy", "kl")}
    floats |= {"log_prob": -draw.random((*shape, 3)), "top_log_prob": np.log(draw.random((*shape, 2)))}
    whole = {"rank": draw.integers(0, 9, (*shape, 3)), "top_id": draw.integers(0, n_pos, (*shape, 2))}
    dims = ("lens", "prompt", "depth", "pos")
    last = {"log_prob": ("choice",), "rank": ("choice",), "top_id": ("top",), "top_log_prob": ("top",)}
    arrays = {}
    for name, values in {**floats, **whole}.items():
        is_float = values.dtype.kind == "f"
        kept = values.astype(np.float32 if is_float else np.int32)
        kept[missing] = np.nan if is_float else -1
        arrays[name] = ((*dims, *last.get(name, ())), kept)
    ids = {name: ("prompt", np.full(n_prompts, i, np.int32)) for i, name in enumerate(("answer_id", "wrong_id"))}
    coordinates = {
        "lens": np.array(["logit", "tuned"], object),
        "prompt": np.arange(n_prompts) * 2,
        "depth": range(n_depths),
    }
    dataset = xr.Dataset(
        {**arrays, **ids, "token_id": (("prompt", "pos"), token_id)},
        {**coordinates, "pos": range(n_pos), "choice": np.array(CHOICES, object)},
    )
    dataset.to_zarr(work.path("tasks/ioi.zarr"), mode="w", zarr_format=3, consolidated=False)
    work.write_table("vocabulary.parquet", pd.DataFrame({"token_id": range(n_pos), "text": tokens}))
    _write_tuned(work)
    return {"answer_share": 0.5}


def _write_tuned(work: Workspace) -> None:
    rows = [("logit", 0, 2.0), ("logit", 1, 1.0), ("tuned", 0, 0.5), ("tuned", 1, 0.25), ("model", -1, 0.0)]
    table = pd.DataFrame(rows, columns=["lens", "depth", "kl"]).assign(top_agreement=0.5, cross_entropy=3.0)
    for name in ("kl", "top_agreement", "cross_entropy"):
        table = table.assign(**{f"{name}_low": table[name] - 0.1, f"{name}_high": table[name] + 0.1})
    work.write_table("evaluation.parquet", table.assign(n_rows=50, n_prompts=5))
    history = [(step, depth, 2.0 / (1 + step + depth)) for step in (0, 10) for depth in (0, 1)]
    training = pd.DataFrame(history, columns=["step", "depth", "validation_kl"])
    work.write_table("training.parquet", training.assign(training_kl=training["validation_kl"]))
    weights = {"blocks.0.hook_resid_pre.weight": torch.zeros(4, 4), "blocks.0.hook_resid_pre.bias": torch.zeros(4)}
    work.write_tensors("translators.safetensors", weights)


def write_probes(work: Workspace, hostile: str, n_prompts: int) -> dict:
    """Write classes and a regression at two layers, the classes at two positions, with causal checks."""
    tasks = [(hostile, "last", 2), (hostile, f"token == '{hostile}'", 2), ("place", "all", 0)]
    probes, curves, tensors, causal = [], [], {}, []
    for label, position, n_classes in tasks:
        for layer, hook in enumerate(HOOKS):
            for kind in KINDS:
                number, test = len(probes), 0.6 + 0.1 * layer + 0.05 * (kind == "mlp")
                place = {"probe": number, "label": label, "hook": hook, "layer": layer, "position": position}
                probes.append({**place, "kind": kind, "n_classes": n_classes, **_figures(test, n_classes)})
                for control in (False, True):
                    losses = {"training": [0.1, 0.3], "validation": [0.4, 0.35]}
                    frame = pd.DataFrame({"l2": [0.01, 1.0], **losses, "kind": kind, "control": control})
                    frame.insert(0, "probe", number)
                    curves.append(frame)
                tensors[f"{number}.weight"] = torch.ones(1, 4)
            causal += _moved(label, hook, position, layer, n_prompts)
    work.write_table("probes.parquet", pd.DataFrame(probes))
    work.write_table("l2.parquet", pd.concat(curves, ignore_index=True))
    work.write_table("causal.parquet", pd.DataFrame(causal))
    work.write_tensors("probes.safetensors", tensors)
    work.write_json("skipped.json", [{"label": hostile, "position": hostile, "reason": "too few rows have a label"}])
    return {"best_accuracy": 0.75, "best_probe": hostile}


def _figures(test: float, n_classes: int) -> dict:
    found = {"l2": 1.0, "n_training": 40, "n_validation": 10, "n_test": 20, "majority": 0.5 * bool(n_classes)}
    found |= {"n_types": 7, "types_seen": 1.0, "training": 0.9, "validation": test - 0.1, "test": test}
    found |= {"low": test - 0.1, "high": test + 0.1, "control": test - 0.2, "selectivity": 0.2}
    for name in ("control", "selectivity"):
        found |= {f"{name}_low": found[name] - 0.1, f"{name}_high": found[name] + 0.1}
    return found | {"auc": 0.8, "auc_low": 0.7, "auc_high": 0.9, "deviation": 1.0}


def _moved(label: str, hook: str, position: str, layer: int, n_prompts: int) -> list[dict]:
    """A step of n deviations adds 2n to its own reading, n to a later one and n + layer to the metric."""
    rows = []
    for direction, amount in (("probe", 0.0), ("probe", -1.0), ("probe", 1.0), ("random", -1.0), ("random", 1.0)):
        for later, read_hook in list(enumerate(HOOKS))[layer:]:
            for prompt in range(n_prompts):
                along = amount * (direction == "probe")
                reading = prompt + along * (2 if later == layer else 1)
                metric = prompt + along * (1 + layer)
                place = {"label": label, "hook": hook, "position": position, "direction": direction, "amount": amount}
                rows.append(
                    {**place, "read_hook": read_hook, "prompt_idx": prompt, "reading": reading, "metric": metric}
                )
    return rows
