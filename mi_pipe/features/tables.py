"""The Parquet tables of scored features, with the columns that `data/README.md` states."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Int

from mi_pipe.core.manifest import Scalar
from mi_pipe.features.contexts import TokenMap, Windows
from mi_pipe.features.density import Density
from mi_pipe.features.examples import Examples
from mi_pipe.features.logit_effects import LogitEffects
from mi_pipe.features.scored_saes import ScoredSAE

DENSE = 0.1
"""A feature that fires on more than this share of rows is called dense, as SAEBench does."""

TokenText = Callable[[int], str]

EXAMPLES_SCHEMA = pa.schema(
    {
        "sae": pa.string(),
        "feature": pa.int32(),
        "group": pa.string(),
        "rank": pa.int32(),
        "activation": pa.float32(),
        "row": pa.int64(),
        "prompt_idx": pa.int32(),
        "pos": pa.int32(),
        "first_pos": pa.int32(),
        "token_ids": pa.list_(pa.int32()),
        "tokens": pa.list_(pa.string()),
        "activations": pa.list_(pa.float32()),
    }
)


def feature_frame(sae: str, density: Density) -> pd.DataFrame:
    """Return `features.parquet` of one SAE, one row a feature from 0."""
    return pd.DataFrame(
        {
            "sae": sae,
            "feature": np.arange(len(density.density), dtype=np.int32),
            "n_firings": density.n_firings,
            "density": density.density,
            "mean_activation": density.mean_activation,
            "max_activation": density.max_activation,
            "is_dead": density.n_firings == 0,
        }
    )


def sae_row(sae: ScoredSAE, density: Density, n_rows: int, n_massive: int) -> dict[str, Scalar]:
    """Return a row of `saes.parquet`, with `n_rows` the rows scored and `n_massive` those left out."""
    live = density.density[density.density > 0]
    return {
        "sae": sae.name,
        "hook": sae.sites.label,
        "kind": sae.sites.kind,
        "effects_of": sae.effects_of,
        "d_sae": len(density.density),
        "n_rows": n_rows,
        "n_massive": n_massive,
        "l0": float(density.n_firings.sum() / max(n_rows, 1)),
        "dead_fraction": float((density.density == 0).mean()),
        "median_density": float(np.median(live)) if len(live) else 0.0,
        "dense_fraction": float((density.density > DENSE).mean()),
    }


def example_table(sae: str, examples: Examples, windows: Windows, tokens: TokenMap, text: TokenText) -> pa.Table:
    """Return a part of `examples.parquet`, one row an example."""
    n = len(examples.row)
    columns = [
        _repeated(sae, n),
        pa.array(examples.feature),
        pa.array(examples.group_names, pa.string()),
        pa.array(examples.rank),
        pa.array(examples.activation),
        pa.array(examples.row),
        pa.array(tokens.prompt_of_row[examples.row]),
        pa.array(tokens.pos_of_row[examples.row]),
        pa.array(windows.first_pos),
        _lists(windows, pa.array(windows.token_ids)),
        _lists(windows, token_texts(windows.token_ids, text)),
        _lists(windows, pa.array(windows.activations)),
    ]
    return pa.Table.from_arrays(columns, schema=EXAMPLES_SCHEMA)


def effect_frame(sae: str, effects: LogitEffects, text: TokenText) -> pd.DataFrame:
    """Return `logit_effects.parquet` of one SAE: by feature, the promoted tokens and then the suppressed ones."""
    n_features, n_ranks = effects.promoted.shape
    token_id = np.concatenate([effects.promoted, effects.suppressed], axis=1).reshape(-1)
    effect = np.concatenate([effects.promoted_effect, effects.suppressed_effect], axis=1).reshape(-1)
    return pd.DataFrame(
        {
            "sae": pd.Series([sae] * len(token_id), dtype="str"),
            "feature": np.repeat(np.arange(n_features, dtype=np.int32), 2 * n_ranks),
            "sign": np.tile(np.repeat(["promoted", "suppressed"], n_ranks), n_features),
            "rank": np.tile(np.arange(n_ranks, dtype=np.int32), 2 * n_features),
            "token_id": token_id,
            "token": token_texts(token_id, text).to_pandas(),
            "effect": effect,
        }
    )


def token_texts(token_ids: Int[np.ndarray, " token"], text: TokenText) -> pa.Array:
    """Return the text of each token; `text` is asked once a distinct token."""
    distinct, place = np.unique(token_ids, return_inverse=True)
    words = pa.array([text(int(token_id)) for token_id in distinct], pa.string())
    return pa.DictionaryArray.from_arrays(pa.array(place.astype(np.int32)), words).dictionary_decode()


def _repeated(word: str, n: int) -> pa.Array:
    return pa.array([word] * n, pa.string())


def _lists(windows: Windows, values: pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(windows.starts.astype(np.int32)), values)
