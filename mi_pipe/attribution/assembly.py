"""From what was measured chunk by chunk to arrays over all pairs, and the table of path patching."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from mi_pipe.attribution.config import PathConfig
from mi_pipe.attribution.nodes import Kind, axes_of
from mi_pipe.attribution.path_nodes import Sender


def gather(
    kind: Kind, chunks: Sequence[Float[np.ndarray, "pair *axes"]], n_pos: int
) -> Float[np.ndarray, "pair *axes"]:
    """Put the chunks' effects of one kind after one another; NaN fills up positions that a pair does not have."""
    if axes_of(kind)[-1] != "pos":
        return np.concatenate(chunks)
    padded = [
        np.pad(some, [*[(0, 0)] * (some.ndim - 1), (0, n_pos - some.shape[-1])], constant_values=np.nan)
        for some in chunks
    ]
    return np.concatenate(padded)


def path_table(
    path: PathConfig,
    number: int,
    senders: Sequence[Sender],
    pairs: np.ndarray,
    patched: Float[np.ndarray, "pair sender"],
    base: Float[np.ndarray, " pair"],
) -> pd.DataFrame:
    """Return one row a sender and pair of one path."""
    rows = {
        "path": np.int32(number),
        "receivers": " ".join(path.receivers),
        "mlps": path.mlps,
        "sender": np.repeat([sender.name for sender in senders], len(pairs)),
        "kind": np.repeat([sender.kind for sender in senders], len(pairs)),
        "layer": np.repeat(np.array([sender.layer for sender in senders], np.int32), len(pairs)),
        "head": np.repeat(np.array([sender.head for sender in senders], np.int32), len(pairs)),
        "pair": np.tile(pairs.astype(np.int32), len(senders)),
        "patched": patched.T.reshape(-1).astype(np.float32),
        "effect": (patched - base[:, None]).T.reshape(-1).astype(np.float32),
    }
    return pd.DataFrame(rows)


def strongest(table: pd.DataFrame, correlations: Mapping[str, float]) -> dict[str, str | float]:
    """Return the main figures: the strongest head (or node, without z) and rank correlations by kind."""
    of_heads = table[table["kind"] == "z"]
    found = of_heads if len(of_heads) else table
    figures: dict[str, str | float] = {}
    if len(found):
        row = found.iloc[int(np.asarray(found["mean_abs"]).argmax())]
        name = f"{row['layer']}.{row['index']}" if len(of_heads) else str(row["node"])
        figures |= {
            "strongest_head" if len(of_heads) else "strongest_node": name,
            "strongest_effect": float(row["mean"]),
        }
    return figures | {f"spearman_{kind}": value for kind, value in correlations.items()}
