"""How strongly each feature of a crosscoder writes at each hook point: what is shared, and what belongs to one alone.

With W_dec,j^h the part of a feature's decoder row at hook point h and s_h = √(d_h / E‖x - μ‖²) the scale by which the
hook point's activations were normalised in training, the scaled norm is s_h ‖W_dec,j^h‖ (one model's activations may be
many times as large as another's, so raw norms do not compare), and its share that of the sum over the hook points. With
two of them the share of the second is the relative decoder norm of Lindsey et al., "Sparse crosscoders for cross-layer
features and model diffing", 2024: 0 for a feature of the first alone, 1/2 for a shared one, 1 for one of the second
alone.
"""

import math

import numpy as np
import pandas as pd
from jaxtyping import Float

from mi_pipe.activations.training.source import RowSource
from mi_pipe.saes.sae import SAE

COLUMNS = ("sae", "feature", "hook", "norm", "scaled_norm", "share")


def decoder_norm_frame(sae: SAE, source: RowSource) -> pd.DataFrame:
    """Return `decoder_norms.parquet` of one SAE: by feature, a row for each of its outputs.

    Empty where the SAE writes one hook point, or one that `source` has no statistics of.
    """
    hooks = sae.sites.outputs
    if len(hooks) == 1 or any(hook not in source.hooks for hook in hooks):
        return no_decoder_norms()
    norms = sae.decoder_norms().detach().cpu().numpy().astype(np.float32)
    scales = np.array([scale_of(source, hook) for hook in hooks], np.float32)
    scaled = norms * scales
    n_features = len(norms)
    return pd.DataFrame(
        {
            "sae": pd.Series([sae.name] * norms.size, dtype="str"),
            "feature": np.repeat(np.arange(n_features, dtype=np.int32), len(hooks)),
            "hook": np.tile(np.array(hooks, dtype=object), n_features),
            "norm": norms.reshape(-1),
            "scaled_norm": scaled.reshape(-1),
            "share": shares(scaled).reshape(-1),
        }
    ).astype({"hook": "str"})


def no_decoder_norms() -> pd.DataFrame:
    """Return the table without rows."""
    kinds = dict(zip(COLUMNS, ("str", "int32", "str", "float32", "float32", "float32"), strict=True))
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in kinds.items()})


def scale_of(source: RowSource, hook: str) -> float:
    """Return √(d / E‖x - μ‖²) of a hook point's activations."""
    return math.sqrt(source.width(hook) / source.statistics(hook).mean_square_norm_centred)


def shares(norms: Float[np.ndarray, "feature output"]) -> Float[np.ndarray, "feature output"]:
    """Return each output's share of a feature's norms; NaN for a feature that writes nowhere.

    >>> shares(np.array([[1.0, 3.0], [0.0, 2.0]])).tolist()
    [[0.25, 0.75], [0.0, 1.0]]
    """
    total = norms.sum(1, keepdims=True)
    return np.divide(norms, total, out=np.full_like(norms, np.nan), where=total > 0)
