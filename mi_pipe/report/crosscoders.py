"""What crosscoders' features write at each hook point: shares in the feature browser, counts and histograms of them.

With two hook points (or two models) a feature's share at the second tells which of them it belongs to; see
`mi_pipe.features.decoder_norms` for the formula.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from mi_pipe.core.artifact import Artifact
from mi_pipe.features.feature_set import NORMS_FILE
from mi_pipe.report.figures import Figure, histogram
from mi_pipe.report.html import rounded, slug

OWN = 0.1
"""A feature with less than this share at all other hook points belongs to one alone."""
_N_BINS = 40
_DIGITS = 4
_TWO = 2


@dataclass(frozen=True)
class DecoderNorms:
    """Norms of the decoder of one crosscoder; features are numbered from 0."""

    hooks: list[str]
    scaled: Float[np.ndarray, "feature hook"]
    share: Float[np.ndarray, "feature hook"]
    """NaN for a feature that writes nowhere."""

    def of(self, features: Int[np.ndarray, " feature"]) -> dict[int, list[list[Any]]]:
        """Return [hook point, scaled norm, share] of each hook point, for some features."""
        scaled, share = rounded(self.scaled[features], _DIGITS), rounded(self.share[features], _DIGITS)
        return {
            int(feature): [list(part) for part in zip(self.hooks, scaled[i], share[i], strict=True)]
            for i, feature in enumerate(features)
        }

    def counts(self, is_live: Bool[np.ndarray, " feature"]) -> dict[str, int]:
        """Return how many live features belong to each hook point alone, and how many are shared."""
        share = self.share[is_live]
        own = {f"only at {hook}": int((share[:, i] > 1 - OWN).sum()) for i, hook in enumerate(self.hooks)}
        return {**own, "shared": int(np.isfinite(share[:, 0]).sum()) - sum(own.values())}


def read_norms(artifact: Artifact, sae: str) -> DecoderNorms | None:
    """Return the norms of one SAE; None if it is no crosscoder, or was scored before these were kept."""
    if NORMS_FILE not in artifact.manifest.files:
        return None
    rows = artifact.read_table(NORMS_FILE).query("sae == @name", local_dict={"name": sae})
    if rows.empty:
        return None
    hooks = list(dict.fromkeys(rows["hook"].astype(str)))
    shape = (-1, len(hooks))
    return DecoderNorms(hooks, *(rows[name].to_numpy(float).reshape(shape) for name in ("scaled_norm", "share")))


def counts_table(found: Mapping[str, DecoderNorms], live: Mapping[str, Bool[np.ndarray, " feature"]]) -> pd.DataFrame:
    """Return one row for each SAE and answer: features of one hook point alone, and shared ones."""
    rows = [
        {"sae": name, "features": what, "n": n}
        for name, norms in found.items()
        for what, n in norms.counts(live[name]).items()
    ]
    return pd.DataFrame(rows, columns=["sae", "features", "n"])


def share_figures(found: Mapping[str, DecoderNorms], live: Mapping[str, Bool[np.ndarray, " feature"]]) -> list[Figure]:
    """Return a histogram of the shares of live features for each crosscoder."""
    return [_shares(name, norms, live[name]) for name, norms in found.items()]


def _shares(name: str, norms: DecoderNorms, is_live: Bool[np.ndarray, " feature"]) -> Figure:
    told = ", ".join(f"{n:,} {what}" for what, n in norms.counts(is_live).items())
    alt = f"Histogram of each live feature's share of the decoder norm for {name}: {told}."
    if len(norms.hooks) == _TWO:
        first, second = norms.hooks
        values = {second: norms.share[is_live, 1]}
        x_title = "share of the decoder norm at the second hook point"
        caption = f"0: only at {first}; 1/2: shared; 1: only at {second}. {told}."
    else:
        values = {hook: norms.share[is_live, i] for i, hook in enumerate(norms.hooks)}
        x_title, caption = "share of the decoder norm at a hook point", f"{told}."
    return histogram(
        f"decoder-share-{slug(name)}",
        f"Where features write: {name}",
        alt,
        values,
        n_bins=_N_BINS,
        span=(0.0, 1.0),
        x_title=x_title,
        y_title="features",
        caption=caption,
    )
