"""Random damage to a published store: all of it is found, and none of it can be read as plausible data.

`python -m tests.faults.corruption_storm --n 1000` damages one file of a small store at a time (single bits, truncation,
deletion, zeroed pages, emptied files, appended bytes, files exchanged with one another), leaving the file's times as
they were, as a failing disk does. Each time `verify --deep` has to name the damage, and every public reader has to
answer with the true values or raise ArtifactDamagedError.
"""

import argparse
import hashlib
import json
import os
import random
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pandas as pd
import torch

import mi_pipe
from mi_pipe.activations import layout
from mi_pipe.activations.training.shuffled import ShuffledReader
from mi_pipe.core import checksum
from mi_pipe.core.errors import ArtifactDamagedError, MiPipeError
from mi_pipe.core.manifest import MANIFEST_NAME
from mi_pipe.core.store import Store
from mi_pipe.verifying import verify
from tests.activations.harvests import HEADS, RESIDUAL, harvest_toy

LENGTHS = [20] * 20 + [33, 7, 7, 20, 64, 1, 40] * 2
_PAGE = 4096


@dataclass
class Tally:
    """What a storm did."""

    tried: int = 0
    found: int = 0
    """By `verify --deep`."""
    misread: int = 0
    """Answers of readers that were neither true nor an error."""
    refused: int = 0
    """Answers that were ArtifactDamagedError."""
    by_damage: dict[str, int] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def _harvest_readers() -> dict[str, Callable[[Any], Any]]:
    rows = np.random.default_rng(0).integers(0, 700, 40)
    readers: dict[str, Callable[[Any], Any]] = {
        "xarray": lambda acts: [acts.to_xarray()[name].values for name in (RESIDUAL, HEADS, "token_id", "pos")],
        "pandas": lambda acts: acts.to_pandas(HEADS, "pos > 3", columns=[0, 5]),
        "index": lambda acts: [acts.token_id, acts.pos, acts.prompt_idx, acts.prompt_offset],
        "tables": lambda acts: [acts.table(), acts.prompts],
        "rows": lambda acts: [acts.rows("pos == 2 and n_tokens == 20"), acts.tokens("3")],
        "statistics": lambda acts: [vars(acts.statistics(hook)) for hook in acts.hooks],
        "summaries": lambda acts: [acts.precision, acts.by_layer(), acts.summary, acts.config, acts.n_rows],
        "massive": lambda acts: [acts.massive(hook) for hook in acts.hooks],
        "prompt": lambda acts: acts.prompt(21)[RESIDUAL].values,
        "training": _training_batches,
    }
    for hook in (RESIDUAL, HEADS):
        readers[f"read_rows {hook}"] = lambda acts, hook=hook: acts.read_rows(hook, 0, acts.n_rows)
        readers[f"take {hook}"] = lambda acts, hook=hook: acts.take(hook, rows)
        readers[f"zarr {hook}"] = lambda acts, hook=hook: acts.group[hook][:]
        readers[f"dask {hook}"] = lambda acts, hook=hook: acts.to_dask(hook)[100:300].compute(scheduler="sync")
        readers[f"blocks {hook}"] = lambda acts, hook=hook: [block.values.copy() for block in acts.blocks(hook, 100)]
    return readers


def _training_batches(acts: Any) -> list[np.ndarray]:
    reader = ShuffledReader(acts, [RESIDUAL, HEADS], 64, pool_rows=256)
    return [batch[hook].numpy().copy() for batch in reader.batches(0, 6) for hook in (RESIDUAL, HEADS)]


READERS: dict[str, dict[str, Callable[[Any], Any]]] = {
    "harvest": _harvest_readers(),
    "generate_prompts": {
        "tokens": lambda prompts: [prompts.token_ids, prompts.token_table()],
        "prompts": lambda prompts: [prompts.prompts, prompts.offsets, prompts.texts(3), prompts.n_tokens],
        "dropped": lambda prompts: prompts.dropped,
    },
    "train_model": {
        "config": lambda model: model.native_config(),
        "weights": lambda model: [value.numpy() for value in model.load("cpu").module.state_dict().values()],
    },
}


class Storm:
    """A small store, and what all its readers answer while it is whole."""

    def __init__(self, folder: Path, seed: int) -> None:
        torch.set_num_threads(1)
        self._random = random.Random(seed)
        self._store = Store(folder)
        harvest_toy(self._store, LENGTHS)
        self._ids = self._store.published_ids()
        self._truth = {name: self._answers(name) for name in self._ids}
        folders = [self._store.folder(name) for name in self._ids]
        self._files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
        self.tally = Tally()

    def damage_one(self) -> None:
        """Damage a file, look whether it is found and what can be read, and put everything back."""
        kind = self._random.choice(list(DAMAGES))
        path = self._random.choice(self._files)
        others = [other for other in self._files if _is_alike(path, other)]
        other = self._random.choice(others) if others else None
        kept = {item: (item.read_bytes(), item.stat()) for item in (path, other) if item is not None}
        if not DAMAGES[kind](path, other, self._random):
            return
        for item, (_, stat) in kept.items():
            if item.exists():
                os.utime(item, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        self._look(kind, path)
        for item, (data, stat) in kept.items():
            item.unlink(missing_ok=True)
            item.write_bytes(data)
            os.utime(item, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def _look(self, kind: str, path: Path) -> None:
        name = path.relative_to(self._store.root).parts[1]
        what = f"{kind} of {path.relative_to(self._store.root)}"
        checksum.forget()
        self.tally.tried += 1
        self.tally.by_damage[kind] = self.tally.by_damage.get(kind, 0) + 1
        named = {damage.file for damage in verify(name, self._store, deep=True).damage}
        # A manifest that was exchanged for the file is all that can be named.
        if named & {str(path.relative_to(self._store.folder(name))), MANIFEST_NAME}:
            self.tally.found += 1
        else:
            self.tally.problems.append(f"not found: {what}")
        checksum.forget()
        for reader, answer in self._answers(name).items():
            if answer == "refused":
                self.tally.refused += 1
            elif answer != self._truth[name][reader]:
                self.tally.misread += 1
                self.tally.problems.append(f"{reader} answers {answer} after {what}")

    def _answers(self, name: str) -> dict[str, str]:
        """Return what each reader answers, as a hash, or that it refuses."""
        readers = READERS[name.rpartition("-")[0]]
        return {reader: self._answer(name, read) for reader, read in readers.items()}

    def _answer(self, name: str, read: Callable[[Any], Any]) -> str:
        try:
            return fingerprint(read(mi_pipe.open(name, self._store)))
        except ArtifactDamagedError:
            return "refused"
        except Exception as error:
            kind = "another of mi_pipe's errors" if isinstance(error, MiPipeError) else "an error of its own"
            return f"with {kind}: {type(error).__name__}: {error}"


def fingerprint(value: Any) -> str:
    """Return a hash of what a reader answered."""
    if isinstance(value, list | tuple):
        parts = [fingerprint(item) for item in value]
    elif isinstance(value, dict):
        parts = [f"{key}: {fingerprint(item)}" for key, item in value.items()]
    elif isinstance(value, pd.DataFrame):
        parts = [value.to_csv()]
    else:
        array = np.asarray(value)
        parts = [array.dtype.str, str(array.shape), array.tobytes().hex() if array.dtype != object else repr(value)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _is_alike(path: Path, other: Path) -> bool:
    """Say whether two files could be taken for one another: same suffix, other content, of one kind of artifact."""
    is_same_kind = path.suffix == other.suffix and path.parent.parent.name == other.parent.parent.name
    return other != path and is_same_kind and path.read_bytes() != other.read_bytes()


def _rewrite(path: Path, data: bytes) -> bool:
    if data == path.read_bytes():
        return False
    path.chmod(0o644)
    path.write_bytes(data)
    return True


def _flip(path: Path, _: Path | None, rng: random.Random) -> bool:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return _rewrite(path, bytes(data))


def _truncate(path: Path, _: Path | None, rng: random.Random) -> bool:
    data = path.read_bytes()
    return _rewrite(path, data[: rng.randrange(len(data))])


def _delete(path: Path, _: Path | None, rng: random.Random) -> bool:
    path.unlink()
    return True


def _zero_page(path: Path, _: Path | None, rng: random.Random) -> bool:
    data = bytearray(path.read_bytes())
    start = _PAGE * rng.randrange(-(-len(data) // _PAGE))
    stop = min(len(data), start + _PAGE)
    data[start:stop] = bytes(stop - start)
    return _rewrite(path, bytes(data))


def _empty(path: Path, _: Path | None, rng: random.Random) -> bool:
    return _rewrite(path, b"")


def _append(path: Path, _: Path | None, rng: random.Random) -> bool:
    return _rewrite(path, path.read_bytes() + rng.choice([b"\0", b" ", b"\n", rng.randbytes(64)]))


def _exchange(path: Path, other: Path | None, rng: random.Random) -> bool:
    if other is None:
        return False
    data, others = path.read_bytes(), other.read_bytes()
    return _rewrite(path, others) and _rewrite(other, data)


DAMAGES: dict[str, Callable[[Path, Path | None, random.Random], bool]] = {
    "flip": _flip,
    "truncation": _truncate,
    "deletion": _delete,
    "zeroed page": _zero_page,
    "emptying": _empty,
    "appending": _append,
    "exchange": _exchange,
}


def storm(n: int, seed: int = 0) -> Tally:
    """Damage a store `n` times."""
    chunk_bytes, layout._CHUNK_BYTES = layout._CHUNK_BYTES, 1024  # four chunks a shard
    try:
        with tempfile.TemporaryDirectory(prefix="corruption-storm-") as folder:
            made = Storm(Path(folder), seed)
            while made.tally.tried < n:
                made.damage_one()
            return made.tally
    finally:
        layout._CHUNK_BYTES = chunk_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(asdict(storm(arguments.n, arguments.seed))))


if __name__ == "__main__":
    main()
