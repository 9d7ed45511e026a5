"""import_activations: activations that another program dumped, as an activation store like a harvest's.

Files and token table are checked against one another before anything is written; a killed import goes on at the first
shard without a commit record. The artifact is known by the content of the files; their paths stand in `execution`.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from mi_pipe.activations.harvest.finishing import finish_store
from mi_pipe.activations.harvest.hook_selection import check_shard_rows
from mi_pipe.activations.storage_dtype import StoreDType
from mi_pipe.activations.store import PRECISION_FILE, PROMPTS_FILE
from mi_pipe.core.canonical import file_sha256
from mi_pipe.core.config import Config, Execution
from mi_pipe.core.errors import ConfigError, StageError
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.stage import Estimate, Stage
from mi_pipe.core.workspace import Workspace
from mi_pipe.export.dumps import kind_of
from mi_pipe.export.import_job import ImportJob, layout_of
from mi_pipe.export.source import Source, open_source

_MASSIVE_FACTOR = 10.0
_TABLE_BYTES_A_ROW = 24


@dataclass(frozen=True)
class Inputs:
    """An import reads files, no artifacts."""


class ImportConfig(Config):
    """Which files hold which hook points, and which token each row is."""

    files: Annotated[tuple[Path, ...], Execution()]
    """Files with arrays: .npy, .safetensors, .h5, .hdf5."""
    tokens: Annotated[Path | None, Execution()] = None
    """Table (.parquet, .csv, .h5) with prompt_idx, pos, token_id and, if known, text; row i is row i of the arrays."""
    hooks: dict[str, str] = Field(default_factory=dict)
    """Hook point to the name of its array in the files, "" to find it; none for all of a file that mi_pipe exported."""
    model: str = ""
    """What the activations are of, as a note."""
    store_dtype: StoreDType | None = None
    """What is stored; by default the dtype of the arrays, or float32 if they differ."""
    massive_factor: float | None = Field(default=None, gt=1)
    """A row is massive if its norm is above this many median norms; by default as it was, or 10."""
    shard_rows: int | None = Field(default=None, ge=1)
    """Rows of a shard, a power of two; by default as it was, or as a harvest chooses."""

    def identity(self) -> dict[str, Any]:
        """Return kind and SHA-256 of every file instead of paths; raises ConfigError for missing files."""
        contents: dict[str, Any] = {"files": [f"{kind_of(path)}:{digest_of_file(path)}" for path in self.files]}
        if self.tokens is not None:
            contents["tokens"] = f"{self.tokens.suffix.removeprefix('.')}:{digest_of_file(self.tokens)}"
        return {**super().identity(), "contents": contents}


def digest_of_file(path: Path) -> str:
    """Return a file's SHA-256, computed once while it does not change; raises ConfigError if it is missing."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    return _digest(path.absolute(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _digest(path: Path, size: int, modified_ns: int) -> str:
    del size, modified_ns
    return file_sha256(path)


def estimate(config: ImportConfig, inputs: Inputs) -> Estimate:
    """Return the bytes of shards and tables; raises ConfigError for files that do not fit together."""
    del inputs
    source = _open(config)
    layout = layout_of(source, config.shard_rows)
    size = layout.size_bytes + layout.n_rows * _TABLE_BYTES_A_ROW
    return Estimate(size, layout.n_shards, "shards")


def _open(config: ImportConfig) -> Source:
    check_shard_rows(config.shard_rows)
    return open_source(config.files, config.hooks, config.tokens, config.store_dtype)


def run(config: ImportConfig, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    """Fill the store; return its main figures."""
    del inputs
    before = config.identity()
    source = _open(config)
    place, scratch = work.place_at(None), work.scratch_at(None)
    job = ImportJob(source, layout_of(source, config.shard_rows), before["contents"], place, scratch)
    job.prepare(work.scratch / "group", _attributes(config, source))
    done = job.commits()
    for shard in done:
        _mark(work, shard)
    work.ledger.expect(job.layout.n_shards)
    todo = [shard for shard in range(job.layout.n_shards) if shard not in done]
    job.fill(todo, lambda shard: _mark(work, shard), lambda n: work.progress.update(n, job.layout.n_rows, "rows"))
    if config.identity() != before:
        raise StageError(f"{config.files[0]} or its token table changed while it was imported. Import it again.")
    return _finish(job, config, work)


def _mark(work: Workspace, shard: int) -> None:
    unit = f"shard {shard}"
    if unit not in work.ledger:
        work.ledger.mark(unit)


def _attributes(config: ImportConfig, source: Source) -> dict[str, Any]:
    origin = source.origin
    return {
        "model": config.model or (origin.model if origin else ""),
        "prompts": origin.prompts_id if origin else "",
        "massive_factor": _massive_factor(config, source),
    }


def _massive_factor(config: ImportConfig, source: Source) -> float:
    known = source.origin.massive_factor if source.origin else _MASSIVE_FACTOR
    return known if config.massive_factor is None else config.massive_factor


def _finish(job: ImportJob, config: ImportConfig, work: Workspace) -> dict[str, Scalar]:
    """Write statistics and tables, hand over the shards' checksums, and return the main figures."""
    source, origin = job.source, job.source.origin
    figures = finish_store(
        work,
        job.place,
        job.scratch,
        job.layout,
        job.commits().values(),
        _massive_factor(config, source),
        lambda massive: [source.labels.table(massive)],
    )
    work.write_table(PROMPTS_FILE, source.labels.prompts)
    unknown = {"precision": "unknown", "store_dtype": source.store_dtype, "reference": "", "hooks": {}}
    work.write_json(PRECISION_FILE, origin.precision if origin else unknown)
    return {**figures, "n_prompts": source.labels.n_prompts, "store_dtype": source.store_dtype}


STAGE = Stage(name="import_activations", version=1, config=ImportConfig, inputs=Inputs, run=run, estimate=estimate)
