"""Where and how strongly features fire: the SAE's activations as a sparse matrix, compressed by feature.

A feature fires on a row when its activation is above zero. Of the (row, feature) matrix only these entries are
kept, sorted by feature and then by row, so that everything about one feature is one slice. Encoding goes
through the SAE in pieces of at most `DENSE_ENTRIES` pre-activations; no larger dense array ever exists. The pieces
depend on d_sae alone, so that the same rows give the same bits in every run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int64
from torch import Tensor

from mi_pipe.saes.code import SparseCode

DENSE_ENTRIES = 1 << 24
"""Largest dense (row, feature) piece: 64 MiB in float32."""

Encoder = Callable[[Tensor], SparseCode]
"""From float32 rows (row, d_in) to their sparse code; `SAE.encode_sparse` is one."""


@dataclass(frozen=True)
class Firings:
    """The firings of features `first_feature`, `first_feature + 1`, …; feature i owns `starts[i]:starts[i + 1]`."""

    first_feature: int
    starts: Int64[np.ndarray, " features_and_one"]
    row: Int64[np.ndarray, " firing"]
    """Row of the activation store; ascending within a feature."""
    activation: Float32[np.ndarray, " firing"]
    """Above zero."""

    @property
    def n_features(self) -> int:
        """Number of features, those that never fire included."""
        return len(self.starts) - 1

    @property
    def counts(self) -> Int64[np.ndarray, " feature"]:
        """On how many rows each feature fires."""
        return np.diff(self.starts)

    @property
    def feature(self) -> Int64[np.ndarray, " firing"]:
        """The feature of each firing."""
        return np.repeat(np.arange(self.n_features) + self.first_feature, self.counts)

    def of(self, feature: int) -> slice:
        """Return the slice of one feature's firings."""
        local = feature - self.first_feature
        return slice(int(self.starts[local]), int(self.starts[local + 1]))

    def at(self, feature: Int[np.ndarray, " query"], row: Int[np.ndarray, " query"]) -> Float32[np.ndarray, " query"]:
        """Return the activation of `feature[i]` on `row[i]`; 0 where it does not fire."""
        stride = int(max(self.row.max(initial=0), row.max(initial=0))) + 1
        known = (self.feature - self.first_feature) * stride + self.row
        asked = (feature.astype(np.int64) - self.first_feature) * stride + row
        if not len(known):
            return np.zeros(len(asked), np.float32)
        place = np.minimum(np.searchsorted(known, asked), len(known) - 1)
        return np.where(known[place] == asked, self.activation[place], np.float32(0))


def piece_rows(d_sae: int) -> int:
    """Return how many rows are encoded at once: a power of two, at least 16."""
    return max(16, 1 << (max(DENSE_ENTRIES // d_sae, 1).bit_length() - 1))


@torch.no_grad()
def encode_rows(
    encode: Encoder,
    d_sae: int,
    activations: Float[np.ndarray, "row d_in"],
    rows: Int[np.ndarray, " row"],
    device: torch.device | str = "cpu",
) -> Firings:
    """Encode rows of activations and return where each of the `d_sae` features fires.

    `rows` are the row numbers in the store, ascending.
    """
    found = [_fired(encode, piece, device) for piece in _pieces(activations, piece_rows(d_sae))]
    starts = np.cumsum([0, *(piece_rows(d_sae) for _ in found)])
    place = np.concatenate(
        [np.zeros(0, np.int64), *(where[0] + start for where, start in zip(found, starts[:-1], strict=True))]
    )
    feature = np.concatenate([np.zeros(0, np.int64), *(where[1] for where in found)])
    activation = np.concatenate([np.zeros(0, np.float32), *(where[2] for where in found)])
    order = _by_feature(feature, d_sae)
    return Firings(0, starts_of(feature, d_sae), rows[place[order]].astype(np.int64), activation[order])


def _pieces(activations: np.ndarray, n_rows: int) -> list[np.ndarray]:
    return [activations[start : start + n_rows] for start in range(0, len(activations), n_rows)]


def _fired(
    encode: Encoder, activations: np.ndarray, device: torch.device | str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return row within the piece, feature and activation of each firing, by row and then by feature."""
    code = encode(torch.from_numpy(activations).to(device))
    fires = code.values > 0
    row, feature = code.entry_rows()[fires], code.features[fires]
    return row.long().cpu().numpy(), feature.long().cpu().numpy(), code.values[fires].float().cpu().numpy()


def _by_feature(feature: np.ndarray, d_sae: int) -> np.ndarray:
    """Return the stable order by feature; small integers are sorted by radix, in linear time."""
    narrow = np.uint16 if d_sae <= np.iinfo(np.uint16).max + 1 else np.int64
    return np.argsort(feature.astype(narrow), kind="stable")


def starts_of(feature: Int[np.ndarray, " firing"], n_features: int) -> Int64[np.ndarray, " features_and_one"]:
    """Return where each feature's slice begins when firings are sorted by feature (numbered from 0)."""
    return np.concatenate([[0], np.cumsum(np.bincount(feature, minlength=n_features))]).astype(np.int64)


def joined(parts: Sequence[Firings]) -> Firings:
    """Join the firings of the same features over successive, disjoint row ranges, given in row order."""
    if len(parts) == 1:
        return parts[0]
    first, n_features = parts[0].first_feature, parts[0].n_features
    feature = np.concatenate([part.feature for part in parts]) - first
    order = _by_feature(feature, n_features)
    row = np.concatenate([part.row for part in parts])[order]
    activation = np.concatenate([part.activation for part in parts])[order]
    return Firings(first, starts_of(feature, n_features), row, activation)
