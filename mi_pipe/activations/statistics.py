"""Statistics of one hook point over all its rows, massive rows apart.

Each shard gives partial sums in float64 and the norm of every row; the total adds them in shard order, so it does not
depend on the order in which shards were made, nor on restarts. A row is massive if its norm is above
`factor` times the median norm of all rows (attention sinks: one such row outweighs a batch in any squared
error). Massive rows are taken out of the sums again once the median is known.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from mi_pipe.activations.storage_dtype import StoreDType, decode

_BLOCK_ROWS = 256


@dataclass(frozen=True)
class ShardSums:
    """What one shard adds to the statistics of one hook point."""

    norms: Float[np.ndarray, " row"]
    """float32"""
    total: Float[np.ndarray, " width"]
    """float64"""
    squares: Float[np.ndarray, " width"]
    """float64"""

    @property
    def n_nonfinite(self) -> int:
        """Rows with an infinite or undefined value."""
        return int((~np.isfinite(self.norms)).sum())


@dataclass(frozen=True)
class HookStatistics:
    """Statistics of a hook point's stored values; all but the counts and `max_norm` leave massive rows out."""

    mean: Float[np.ndarray, " width"]
    """float64"""
    variance: Float[np.ndarray, " width"]
    """float64; of the population (division by n_rows)"""
    n_rows: int
    """Rows counted here, without massive ones."""
    n_massive: int
    median_norm: float
    """Median of the norms of all rows, massive ones too."""
    massive_threshold: float
    """Rows with a larger norm are massive."""
    mean_norm: float
    mean_square_norm: float
    """Mean of the squared norms."""
    mean_square_norm_centred: float
    """Mean squared distance from the mean: the sum of the variances."""
    max_norm: float
    """Largest norm of all rows."""
    covariance: Float[np.ndarray, "width width"] | None = None
    """float64; of the population. None where the harvest did not keep it."""

    def to_tensors(self, hook: str) -> dict[str, Tensor]:
        """Return the statistics as tensors named `<hook>.<field>`, float64 or int64."""
        values = {f"{hook}.{item.name}": getattr(self, item.name) for item in fields(self)}
        return {name: torch.from_numpy(np.array(value)) for name, value in values.items() if value is not None}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], hook: str) -> "HookStatistics":
        """Read the statistics of one hook point."""
        values = {item.name: tensors[f"{hook}.{item.name}"] for item in fields(cls) if item.name != "covariance"}
        if f"{hook}.covariance" in tensors:
            values["covariance"] = tensors[f"{hook}.covariance"]
        plain: dict[str, Any] = {name: value.numpy() if value.ndim else value.item() for name, value in values.items()}
        return cls(**plain)


def shard_sums(chunks: Iterable[Shaped[np.ndarray, "row width"]], store_dtype: StoreDType, width: int) -> ShardSums:
    """Return the sums of a shard's stored rows."""
    norms: list[Float[np.ndarray, " row"]] = []
    total, squares = np.zeros(width), np.zeros(width)
    single, double = np.empty((_BLOCK_ROWS, width), np.float32), np.empty((_BLOCK_ROWS, width), np.float64)
    for chunk in chunks:
        for start in range(0, len(chunk), _BLOCK_ROWS):
            block = chunk[start : start + _BLOCK_ROWS]
            values = double[: len(block)]
            np.copyto(values, decode(block, store_dtype, single[: len(block)]))
            with np.errstate(over="ignore", invalid="ignore"):
                total += values.sum(0)
                np.multiply(values, values, out=values)
                squares += values.sum(0)
                norms.append(np.sqrt(values.sum(1)).astype(np.float32))
    return ShardSums(np.concatenate(norms), total, squares)


def massive_threshold(norms: Float[np.ndarray, " row"], factor: float) -> tuple[float, float]:
    """Return the median norm and the norm above which a row is massive."""
    middle = [(len(norms) - 1) // 2, len(norms) // 2]
    # The mean of the two in the middle in float64; the norms themselves need no wider copy.
    median = float(np.partition(norms, middle)[middle].mean(dtype=np.float64))
    return median, factor * median


def combine(
    shards: Sequence[ShardSums],
    massive: Bool[np.ndarray, " row"],
    massive_values: Float[np.ndarray, "massive width"],
    factor: float,
) -> HookStatistics:
    """Add up the shards (in their order) and take the massive rows, given with their values, out again."""
    norms = np.concatenate([shard.norms for shard in shards])
    median, threshold = massive_threshold(norms, factor)
    taken = massive_values.astype(np.float64)
    total = sum((shard.total for shard in shards), np.zeros(taken.shape[1])) - taken.sum(0)
    squares = sum((shard.squares for shard in shards), np.zeros(taken.shape[1])) - np.square(taken).sum(0)
    n_rows = int((~massive).sum())
    mean = total / n_rows
    variance = np.maximum(squares / n_rows - mean**2, 0.0)
    return HookStatistics(
        mean=mean,
        variance=variance,
        n_rows=n_rows,
        n_massive=int(massive.sum()),
        median_norm=median,
        massive_threshold=threshold,
        mean_norm=float(norms[~massive].mean(dtype=np.float64)),
        mean_square_norm=float(squares.sum()) / n_rows,
        mean_square_norm_centred=float(variance.sum()),
        max_norm=float(norms.max()),
    )
