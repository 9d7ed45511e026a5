"""The speed of the shuffled training reader: python -m bench.reader [--rows N] [--width D] [--rounds R] [--folder F]

Writes a store with the harvest's writer, reads it in the ways below in turn, round after round, and prints a JSON line
for each figure: the median over the rounds, and every round's value. Tokens are rows of `--width` float16 values.

`warm_tokens_per_s`: batches as they are stored, from the page cache. `float32_tokens_per_s`: the same, converted.
`first_epoch_tokens_per_s`: a new reader, with every checksum compared and all memory new. `of_copies`: CPU seconds of
the two copies that no shuffling can do without (cache to pool, pool to batch) over those of warm reading; other
programs on the machine disturb it least. `cold_tokens_per_s`, `cold_of_disk`: a new reader once the files are dropped
from the cache, and over a sequential read of the same files, dropped likewise (`disk_tokens_per_s`). `per_cpu_s`:
tokens a second of CPU time, all threads together. `mates`: rows of the same prompt that a row meets in its batch.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.synthetic_store import HOOK, SyntheticConfig, row_numbers, synthetic_store
from mi_pipe.activations.store import ActivationStore
from mi_pipe.activations.training.gatherer import BatchDType
from mi_pipe.activations.training.shuffled import ShuffledReader

_BATCH_ROWS = 4096
_POOL_ROWS = 1 << 18
_N_CTX = 128
_READ_BYTES = 1 << 23
_MATES_BATCHES = 16


@dataclass(frozen=True)
class Pass:
    """One measurement."""

    tokens_per_s: float
    tokens_per_cpu_s: float


class Subject:
    """The store and the ways to read it."""

    def __init__(self, store: ActivationStore) -> None:
        self.store = store
        width = store.width(HOOK)
        self._filled, self._leaving = np.ones((2, min(_POOL_ROWS, store.n_rows), width), np.float16)
        self._batch = np.ones((_BATCH_ROWS, width), np.float16)

    def reader(self) -> ShuffledReader:
        """Return a reader that has verified nothing yet."""
        return ShuffledReader(ActivationStore(self.store.path), [HOOK], _BATCH_ROWS, pool_rows=_POOL_ROWS)

    def warm(self, dtype: BatchDType) -> Pass:
        """Read two epochs in the middle of a longer stream: what was read ahead before is read ahead at the end too."""
        reader = self.reader()
        n_steps = reader.n_steps_per_epoch
        with closing(reader.batches(0, 4 * n_steps, dtype)) as stream:
            _advance(stream, n_steps)
            return _advance(stream, 2 * n_steps)

    def first_epoch(self) -> Pass:
        """Read an epoch with a new reader."""
        reader = self.reader()
        return _advance(reader.batches(0, reader.n_steps_per_epoch, "stored"), reader.n_steps_per_epoch)

    def cold(self) -> Pass:
        """Read an epoch with a new reader from the disk."""
        self._drop_cache()
        return self.first_epoch()

    def disk(self) -> Pass:
        """Read the same files from the disk, one after the other."""
        self._drop_cache()
        return _timed(self.store.n_rows, self._read_files)

    def copies(self) -> Pass:
        """Do only what cannot be left out, in one thread: fill a pool from the cache, gather another one's rows."""
        array, n_rows = self.store.array(HOOK), len(self._leaving)
        block_rows = array.layout.chunk_rows
        order = np.random.default_rng(0).permutation(n_rows)

        def copy() -> None:
            for start in range(0, n_rows, block_rows):
                array.read_into(self._filled[start : start + block_rows], start)
            for start in range(0, n_rows - _BATCH_ROWS + 1, _BATCH_ROWS):
                np.take(self._leaving, order[start : start + _BATCH_ROWS], axis=0, out=self._batch, mode="clip")

        return _timed(n_rows, copy)

    def mates(self) -> tuple[float, float]:
        """Return how many rows of its prompt a row meets in its batch, measured and by the formula."""
        reader = self.reader()
        found: list[float] = []
        for batch in reader.batches(0, _MATES_BATCHES, "stored"):
            counts = np.bincount(self.store.prompt_idx[row_numbers(batch[HOOK].numpy())])
            found.append(float((counts * (counts - 1)).sum() / _BATCH_ROWS))
        n_pools = -(-reader.n_rows // _POOL_ROWS)
        return statistics.fmean(found), _BATCH_ROWS * (_N_CTX - 1) * n_pools / reader.n_rows

    def _read_files(self) -> None:
        buffer = memoryview(bytearray(_READ_BYTES))
        for path in self._shards():
            handle = os.open(path, os.O_RDONLY)
            offset = 0
            while n_read := os.preadv(handle, [buffer], offset):
                offset += n_read
            os.close(handle)

    def _drop_cache(self) -> None:
        for path in self._shards():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)

    def _shards(self) -> list[Path]:
        return sorted((self.store.group_path / HOOK / "c").glob("*/0"), key=lambda path: int(path.parent.name))


def _advance(stream: Iterator[Any], n_steps: int) -> Pass:
    def take() -> None:
        for _ in range(n_steps):
            next(stream)

    return _timed(n_steps * _BATCH_ROWS, take)


def _timed(n_rows: int, work: Callable[[], None]) -> Pass:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Pass(n_rows / (time.perf_counter() - wall), n_rows / (time.process_time() - cpu))


def figures(store: ActivationStore, n_rounds: int) -> Iterator[dict[str, Any]]:
    """Yield one dict a figure."""
    subject = Subject(store)
    ways: dict[str, Callable[[], Pass]] = {
        "warm": lambda: subject.warm("stored"),
        "copies": subject.copies,
        "float32": lambda: subject.warm("float32"),
        "first_epoch": subject.first_epoch,
        "disk": subject.disk,
        "cold": subject.cold,
    }
    found: dict[str, list[Pass]] = {name: [] for name in ways}
    for _ in range(n_rounds):
        for name, way in ways.items():
            found[name].append(way())
    for name in ("warm", "float32", "first_epoch", "cold", "disk"):
        per_cpu_s = statistics.median(item.tokens_per_cpu_s for item in found[name])
        figure = _figure(f"{name}_tokens_per_s", [item.tokens_per_s for item in found[name]])
        yield {**figure, "per_cpu_s": float(f"{per_cpu_s:.3g}")}
    pairs = zip(found["warm"], found["copies"], strict=True)
    yield _figure("of_copies", [read.tokens_per_cpu_s / bound.tokens_per_cpu_s for read, bound in pairs])
    pairs = zip(found["cold"], found["disk"], strict=True)
    yield _figure("cold_of_disk", [read.tokens_per_s / bound.tokens_per_s for read, bound in pairs])
    mates, formula = subject.mates()
    yield {"mates": round(mates, 3), "formula": round(formula, 3)}


def _figure(name: str, values: list[float]) -> dict[str, Any]:
    return {name: float(f"{statistics.median(values):.4g}"), "rounds": [float(f"{value:.3g}") for value in values]}


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1 << 20, help="tokens in the store")
    parser.add_argument("--width", type=int, default=576, help="values a token")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each figure")
    parser.add_argument("--folder", type=Path, help="where to make the store (1.2 GB); the temporary folder by default")
    args = parser.parse_args()
    config = SyntheticConfig(n_prompts=args.rows // _N_CTX, n_ctx=_N_CTX, width=args.width)
    with synthetic_store(config, args.folder) as store:
        for figure in figures(store, args.rounds):
            print(json.dumps(figure), flush=True)


if __name__ == "__main__":
    main()
