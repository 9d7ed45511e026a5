"""What the stage `heads` adds to scores and patterns, small and made up."""

import numpy as np
import pandas as pd
import xarray as xr

from mi_pipe.core.workspace import Workspace
from mi_pipe.heads.classes import Thresholds, classify, criteria, criteria_record

PLACES = ["io", "s1", "s1+1", "s2", "end"]
HABITS = ["attention_entropy", "first_token_share", "mean_distance", "previous_token"]


def write_evidence(work: Workspace, n_layers: int, n_heads: int, n_pairs: int) -> None:
    """Write classes, attention, attribution and composition; head 1.0 moves names, 0.1 is a candidate for one class."""
    rng = np.random.default_rng(3)
    layer, head = np.indices((n_layers, n_heads), dtype=np.int32).reshape(2, -1)
    table = pd.DataFrame({"layer": layer, "head": head, "induction": 0.1, "prefix_matching": 0.1})
    table["end_to_io"] = np.where((layer == 1) & (head == 0), 0.6, 0.1)
    table["logit_share"] = np.where((layer == 1) & (head == 0), 0.3, 0.0)
    table.loc[(layer == 0) & (head == 1), "induction"] = 0.8
    rules = criteria(Thresholds())
    work.write_table("classes.parquet", classify(table, rules))
    refused = {"attribution of facts": "<b>no</b>"}
    work.write_json("classes.json", {"criteria": criteria_record(rules), "task": "ioi", "refused": refused})
    by_head = ("pair", "layer", "head")
    places = rng.uniform(size=(n_pairs, n_layers, n_heads, len(PLACES), len(PLACES))).astype(np.float32)
    habits = rng.uniform(size=(n_pairs, n_layers, n_heads, len(HABITS))).astype(np.float32)
    attention = {"places": ((*by_head, "from", "to"), places), "habits": ((*by_head, "habit"), habits)}
    _write(work, "attention/ioi.zarr", attention, {"place": PLACES, "habit": HABITS})
    heads = rng.normal(size=(n_pairs, n_layers, n_heads)).astype(np.float32)
    layers = {name: rng.normal(size=(n_pairs, n_layers)).astype(np.float32) for name in ("mlps", "attn_bias")}
    single = {name: rng.normal(size=n_pairs).astype(np.float32) for name in ("embed", "pos_embed", "bias")}
    total = heads.sum((1, 2)) + sum(part.sum(1) for part in layers.values()) + sum(single.values())
    parts = {"heads": (by_head, heads), **{name: (("pair", "layer"), values) for name, values in layers.items()}}
    parts |= {name: (("pair",), values) for name, values in {**single, "logit_diff": total}.items()}
    _write(work, "attribution/ioi.zarr", parts, {"metric": "logit_diff"})
    dims = ("layer", "head", "later_layer", "later_head")
    scores = np.full((n_layers, n_heads, n_layers, n_heads), np.nan, np.float32)
    scores[0, :, 1] = rng.uniform(size=(n_heads, n_heads))
    composition = dict.fromkeys("qkv", (dims, scores))
    _write(work, "composition.zarr", composition, {"random_mean": 0.1})


def _write(work: Workspace, name: str, arrays: dict, attributes: dict) -> None:
    xr.Dataset(arrays, attrs=attributes).to_zarr(work.path(name), zarr_format=3, consolidated=False)
