"""Writes finished shards in a thread of its own, while the forward pass fills the next one.

For a shard: statistics, checksums and index (several hook points at once where there are cores), one file a hook point,
the sums in scratch space, and then the commit record, which is what makes it done. A shard that another writer has
committed meanwhile is compared, not written. Two sets of buffers take turns, so memory does not depend on the number of
tokens.
"""

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import numpy as np
from jaxtyping import Shaped

from mi_pipe.activations.commits import Commit, commit_name, committed, conflict_text, write_commit
from mi_pipe.activations.covariance import shard_scatter
from mi_pipe.activations.group import GROUP_NAME
from mi_pipe.activations.harvest.scatter_files import ScatterFiles, is_worth_keeping
from mi_pipe.activations.harvest.sums_file import write_sums
from mi_pipe.activations.layout import ArrayLayout, StoreLayout
from mi_pipe.activations.shard_file import ShardBuffer
from mi_pipe.activations.statistics import ShardSums, shard_sums
from mi_pipe.core.errors import StageError
from mi_pipe.core.place import Place

_N_BUFFER_SETS = 2
_THREADS = max(1, (os.cpu_count() or 1) // 4)
"""Hook points at a time, and threads of a covariance. Most cores are the model's, or idle beside a GPU; the number
changes no bit."""

Buffers = dict[str, ShardBuffer]


class StorageOverflowError(StageError):
    """Values do not fit into the dtype they are to be stored in."""


class ShardWriter:
    """A context within which shards are filled by the caller and written in the background."""

    def __init__(
        self,
        place: Place,
        scratch: Place,
        layout: StoreLayout,
        plan: str,
        on_commit: Callable[[int], None],
    ) -> None:
        """Write to the artifact's `place`; `on_commit(shard)` is called when a shard is done."""
        self._place = place
        self._scratch = scratch
        self._layout = layout
        self._plan = plan
        self._on_commit = on_commit
        self._sets: list[Buffers] = []
        self._turn = 0
        self._pending: list[Future[None]] = []
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="shard-writer")
        self._hooks = ThreadPoolExecutor(_THREADS, thread_name_prefix="hook-point")

    def __enter__(self) -> "ShardWriter":
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the shards handed over; raises what writing them raised, unless already leaving with an error."""
        self._executor.shutdown(wait=True, cancel_futures=kind is not None)
        self._hooks.shutdown()
        if kind is None:
            for future in self._pending:
                future.result()

    def buffers(self) -> Buffers:
        """Return buffers to fill, once one of the sets is free; raises what writing an earlier shard raised."""
        while len(self._pending) >= _N_BUFFER_SETS or (self._pending and self._pending[0].done()):
            self._pending.pop(0).result()
        if len(self._sets) < _N_BUFFER_SETS:
            self._sets.append({array.name: ShardBuffer(array) for array in self._layout.arrays})
            return self._sets[-1]
        self._turn = (self._turn + 1) % _N_BUFFER_SETS
        return self._sets[self._turn - 1]

    def submit(self, shard: int, buffers: Buffers) -> None:
        """Hand over a filled shard; its buffers are free again when `buffers` returns them."""
        self._pending.append(self._executor.submit(self._write, shard, buffers))

    def _write(self, shard: int, buffers: Buffers) -> None:
        n_rows = self._layout.shard_n_rows(shard)
        arrays = self._layout.arrays
        finished = [*self._hooks.map(lambda array: self._finish_array(array, shard, buffers[array.name]), arrays)]
        data = {array.key(shard): content for array, (_, content) in zip(arrays, finished, strict=True)}
        files = {array.key(shard): (array.file_bytes(n_rows), buffers[array.name].checksum(n_rows)) for array in arrays}
        write_sums(self._scratch, shard, {array.name: sums for array, (sums, _) in zip(arrays, finished, strict=True)})
        self._commit(Commit(shard, self._layout.bounds(shard), self._plan, files), data)
        self._on_commit(shard)

    def _finish_array(
        self, array: ArrayLayout, shard: int, buffer: ShardBuffer
    ) -> tuple[ShardSums, Shaped[np.ndarray, " byte"]]:
        """Return the sums and the file's bytes of one hook point of a shard; raises StorageOverflowError."""
        n_rows = self._layout.shard_n_rows(shard)
        chunks = buffer.chunks(n_rows)
        sums = shard_sums(chunks, array.store_dtype, array.width)
        self._refuse_nonfinite(array, shard, sums)
        if array.name in self._layout.with_covariance and is_worth_keeping(array):
            kept = ScatterFiles(self._scratch, array.name, self._layout.n_shards)
            kept.add(shard, shard_scatter(chunks, array.store_dtype, sums, _THREADS))
        return sums, buffer.encode(n_rows)

    def _commit(self, commit: Commit, data: dict[str, Shaped[np.ndarray, " byte"]]) -> None:
        """Write a shard's files and then its record, unless another writer has done so."""
        record = commit_name(commit.shard)
        # Asked before it is judged: a record that another writer makes after that is a good one, and stays.
        has_record = self._place.size(record) is not None
        found = committed(self._place, self._layout, self._plan, commit.shard)
        if found is not None:
            if found != commit:
                raise StageError(conflict_text(self._place, commit.shard))
            return
        if has_record:
            self._place.remove(record)
        for key, content in data.items():
            self._place.write(f"{GROUP_NAME}/{key}", content.data)
        write_commit(self._place, commit)

    def _refuse_nonfinite(self, array: ArrayLayout, shard: int, sums: ShardSums) -> None:
        if not sums.n_nonfinite:
            return
        start, stop = self._layout.bounds(shard)
        largest = f"the largest {array.store_dtype} is {np.finfo(np.float16).max:,.0f}"
        hint = f" ({largest}); set store_dtype: bfloat16" if array.store_dtype == "float16" else "; check the model"
        raise StorageOverflowError(
            f"{sums.n_nonfinite} of rows {start:,} to {stop:,} (shard {shard}) of {array.name} hold values that are "
            f"not finite as {array.store_dtype}{hint}."
        )
