"""Scatter matrices of a hook point's rows: what covariances are made of, shard by shard.

A scatter is the number of rows, their mean, and S = Σ (x - mean)(x - mean)ᵀ in float64. Two of them are merged by the
formula of Chan, Golub and LeVeque (1983): S = S₁ + S₂ + δδᵀ n₁n₂/n with δ = mean₂ - mean₁, which loses nothing however
far from zero the means are.

Within a shard the products run in float32 on rows less the shard's mean, 512 rows at a time, and are added up in
float64: 1e-6 of √(S_ii S_jj), at a third of float64's cost. Rows whose norm is far above the shard's median (attention
sinks would drown the others' products) are left out of these and taken in float64, so that the massive ones among them
can be taken out again without a trace. A shard's scatter is a function of its rows alone: every product is computed by
one thread, since the split into threads changes the last bits.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped
from threadpoolctl import ThreadpoolController

from mi_pipe.activations.statistics import ShardSums
from mi_pipe.activations.storage_dtype import StoreDType, decode

_BLOCK_ROWS = 512
_FAR = 4.0
"""Rows with more than this many median norms are taken in float64."""


@dataclass(frozen=True)
class Scatter:
    """The scatter of some rows about their mean; float64."""

    n_rows: int
    mean: Float[np.ndarray, " width"]
    matrix: Float[np.ndarray, "width width"]

    @property
    def covariance(self) -> Float[np.ndarray, "width width"]:
        """Covariance of the population (division by n_rows)."""
        return self.matrix / self.n_rows


def merged(first: Scatter, second: Scatter) -> Scatter:
    """Return the scatter of the rows of both."""
    n_rows = first.n_rows + second.n_rows
    apart = second.mean - first.mean
    mean = first.mean + apart * (second.n_rows / n_rows)
    matrix = first.matrix + second.matrix + np.outer(apart, apart * (first.n_rows * second.n_rows / n_rows))
    return Scatter(n_rows, mean, matrix)


def without(scatter: Scatter, values: Float[np.ndarray, "row width"]) -> Scatter:
    """Return the scatter of the other rows when those with `values` are taken out; some have to be left."""
    taken = values.astype(np.float64) - scatter.mean
    n_rows = scatter.n_rows - len(taken)
    shift = -taken.sum(0) / n_rows
    matrix = scatter.matrix - taken.T @ taken - np.outer(shift, shift * n_rows)
    return Scatter(n_rows, scatter.mean + shift, matrix)


def shard_scatter(
    chunks: Sequence[Shaped[np.ndarray, "row width"]], store_dtype: StoreDType, sums: ShardSums, n_threads: int = 1
) -> Scatter:
    """Return the scatter of a shard's stored rows, given with their sums; the same for any number of threads."""
    is_far = sums.norms > _FAR * np.median(sums.norms)
    blocks = list(_blocks(chunks, is_far))
    far = _far_values(blocks, store_dtype, len(sums.total))
    n_near, total = len(is_far) - len(far), sums.total - far.sum(0)
    mean = total / n_near
    # What float32 makes of the mean is as good a centre: it only keeps the products from losing digits to the mean.
    centre = mean.astype(np.float32)
    matrix = np.zeros((len(mean), len(mean)))
    for products in _in_order(blocks, store_dtype, centre, n_threads):
        matrix += products
    shift = mean - centre
    near = Scatter(n_near, mean, matrix - np.outer(shift, shift * n_near))
    return merged(near, _exact_scatter(far)) if len(far) else near


def _exact_scatter(values: Float[np.ndarray, "row width"]) -> Scatter:
    mean = values.mean(0)
    return Scatter(len(values), mean, (values - mean).T @ (values - mean))


@dataclass(frozen=True)
class _Block:
    """Some rows as they are stored, and which of them are far out."""

    rows: Shaped[np.ndarray, "row width"]
    is_far: Bool[np.ndarray, " row"]


def _blocks(chunks: Sequence[Shaped[np.ndarray, "row width"]], is_far: Bool[np.ndarray, " row"]) -> Iterator[_Block]:
    row = 0
    for chunk in chunks:
        for start in range(0, len(chunk), _BLOCK_ROWS):
            rows = chunk[start : start + _BLOCK_ROWS]
            yield _Block(rows, is_far[row : row + len(rows)])
            row += len(rows)


def _far_values(blocks: Sequence[_Block], store_dtype: StoreDType, width: int) -> Float[np.ndarray, "row width"]:
    found = [decode(block.rows[block.is_far], store_dtype) for block in blocks if block.is_far.any()]
    return np.concatenate([np.empty((0, width)), *found], dtype=np.float64)


def _in_order(
    blocks: Sequence[_Block], store_dtype: StoreDType, centre: Float[np.ndarray, " width"], n_threads: int
) -> Iterator[Float[np.ndarray, "width width"]]:
    """Yield the products of each block, of several at a time, in the blocks' order; overwritten by later ones."""
    width = len(centre)
    room = [
        (np.empty((_BLOCK_ROWS, width), np.float32), np.empty((width, width), np.float32)) for _ in range(n_threads)
    ]

    def products(block: _Block, turn: int) -> Float[np.ndarray, "width width"]:
        values, out = room[turn][0][: len(block.rows)], room[turn][1]
        np.subtract(decode(block.rows, store_dtype, values), centre, out=values)
        values[block.is_far] = 0
        # NumPy computes xᵀx of one array as BLAS's syrk: half of a product's cost.
        return np.matmul(values.T, values, out=out)

    with _one_thread, ThreadPoolExecutor(n_threads, thread_name_prefix="covariance") as executor:
        for start in range(0, len(blocks), n_threads):
            yield from executor.map(products, blocks[start : start + n_threads], range(n_threads))


class _OneThread:
    """Has NumPy's BLAS use one thread as long as anyone in this process needs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_users = 0
        self._limit: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._n_users == 0:
                self._limit = ThreadpoolController().limit(limits=1, user_api="blas")
            self._n_users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._n_users -= 1
            if self._n_users == 0:
                self._limit.restore_original_limits()


_one_thread = _OneThread()
