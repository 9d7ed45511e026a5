"""A published artifact of the stage `attribute`, made of the samples' hostile text."""

import numpy as np
import pandas as pd

from mi_pipe.attribution.attributions import (
    ATTRIBUTION_FOLDER,
    NODES_FILE,
    PAIRS_FILE,
    PATHS_FILE,
    VERIFIED_FILE,
    attribution_dataset,
)
from mi_pipe.attribution.ranking import node_table
from mi_pipe.core.workspace import Workspace


def write_attribution(work: Workspace, tokens: list[str], n_layers: int, n_heads: int, n_pairs: int) -> None:
    n_pos, draw = len(tokens), np.random.default_rng(0)
    effects = {
        "z": draw.standard_normal((n_pairs, n_layers, n_heads, n_pos)).astype(np.float32),
        "attn_out": draw.standard_normal((n_pairs, n_layers, n_pos)).astype(np.float32),
    }
    whole = {kind: value.sum(-1) for kind, value in effects.items()}
    clean, corrupted = (np.full(n_pairs, value, np.float32) for value in (3.0, -1.0))
    attributes = {"method": "atp", "direction": "denoising", "metric": "logit_diff", "ig_steps": 0, "ig_convention": ""}
    metrics = {"clean": clean, "corrupted": corrupted}
    pairs = np.arange(n_pairs)
    attribution_dataset(effects, whole, metrics, {}, pairs, attributes).to_zarr(
        work.path(ATTRIBUTION_FOLDER), mode="w", zarr_format=3, consolidated=False
    )
    table = pd.DataFrame({"pair": pairs, "n_pos": n_pos, "clean": clean, "corrupted": corrupted})
    work.write_table(PAIRS_FILE, table.assign(labels=[tokens] * n_pairs))
    nodes = node_table(whole)
    work.write_table(NODES_FILE, nodes)
    exact = nodes.assign(exact_mean=nodes["mean"] + 0.1, exact_mean_abs=nodes["mean_abs"], pair_correlation=0.5)
    work.write_table(VERIFIED_FILE, exact)
    senders = pd.DataFrame(
        [
            {"sender": f"a{i}.h{h}", "kind": "head", "layer": i, "head": h}
            for i in range(n_layers)
            for h in range(n_heads)
        ]
        + [{"sender": f"m{i}", "kind": "mlp", "layer": i, "head": 0} for i in range(n_layers)]
    )
    work.write_table(
        PATHS_FILE,
        senders.assign(
            path=0, receivers="logits", mlps="frozen", pair=0, patched=1.0, effect=np.arange(len(senders)) / 8
        ),
    )
