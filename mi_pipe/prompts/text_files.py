"""Documents from local files: plain text (one document a file), JSON lines, Parquet.

A file is known by its content. Its name enters neither the artifact's id nor the prompts: documents are called
after the file's place in the list, and the manifest's `execution` keeps the paths.
"""

import hashlib
import io
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

from mi_pipe.core.canonical import file_sha256
from mi_pipe.core.config import Config, Execution
from mi_pipe.core.errors import PromptError
from mi_pipe.prompts.documents import Document

_JSON_LINES = (".jsonl", ".ndjson")


class TextFiles(Config):
    """Local files of text."""

    paths: Annotated[tuple[Path, ...], Execution()] = ()
    """Text files (.txt, .md and others), JSON lines (.jsonl) or Parquet (.parquet), below the working folder."""
    text_field: str = "text"
    """The field or column with the text, for JSON lines and Parquet."""

    def identity(self) -> dict[str, Any]:
        """Return kind and SHA-256 of every file instead of paths; raises PromptError for missing or empty files."""
        contents = [f"{_kind(path)}:{known_digest(path)}" for path in self.paths]
        return {**super().identity(), "contents": contents}


def file_documents(files: TextFiles) -> list[Document]:
    """Read all documents; raises PromptError naming file and line for what cannot be read."""
    found: list[Document] = []
    for i, path in enumerate(files.paths, start=1):
        for place, text in _texts(path, known_content(path), files.text_field):
            if text.strip():
                found.append(Document(f"file {i}{place}", text))
    if not found:
        raise PromptError(f"The files {', '.join(map(str, files.paths))} hold no text.")
    return found


def decoded(path: Path, content: bytes) -> str:
    """Return the text of a file; raises PromptError if it is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error


def json_lines(path: Path, content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number and object of each line that is not blank; raises PromptError for a line that is no object."""
    for number, line in enumerate(decoded(path, content).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise PromptError(f"{path}, line {number} is not JSON: {error}.") from error
        if not isinstance(value, dict):
            raise PromptError(f'{path}, line {number} is no JSON object such as {{"text": "…"}}.')
        yield number, value


def _texts(path: Path, content: bytes, name: str) -> Iterator[tuple[str, str]]:
    kind = _kind(path)
    if kind == "text":
        yield "", decoded(path, content)
    elif kind == "jsonl":
        for number, value in json_lines(path, content):
            yield f" line {number}", _field(value, name, f"{path}, line {number}")
    else:
        yield from _parquet_texts(path, content, name)


def _parquet_texts(path: Path, content: bytes, name: str) -> Iterator[tuple[str, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(io.BytesIO(content))
    except pa.ArrowInvalid as error:
        raise PromptError(f"{path} is not a Parquet file: {error}") from error
    if name not in file.schema_arrow.names:
        raise PromptError(f"{path} has no column {name!r}; it has {', '.join(file.schema_arrow.names)}.")
    for i, text in enumerate(file.read([name])[name].to_pylist()):
        yield f" row {i}", _field({name: text}, name, f"{path}, row {i}")


def _field(value: dict[str, Any], name: str, where: str) -> str:
    text = value.get(name)
    if not isinstance(text, str):
        what = "is no text" if name in value else f"is missing; it has {', '.join(value) or 'no fields'}"
        raise PromptError(f"{where}: the field {name!r} {what}. `text_field` names the field with the text.")
    return text


def _kind(path: Path) -> str:
    if path.suffix in _JSON_LINES:
        return "jsonl"
    return "parquet" if path.suffix == ".parquet" else "text"


def known_content(path: Path) -> bytes:
    """Return a file's bytes; raises PromptError if it is missing, empty, or changed while it was being read."""
    digest = known_digest(path)
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:
        raise PromptError(f"{path} changed while it was being read. Run again when it is complete.")
    return content


def known_digest(path: Path) -> str:
    """Return a file's SHA-256; raises PromptError if it is missing, empty or may not be read."""
    try:
        stat = path.stat()
        if not path.is_file():
            raise PromptError(f"{path} is not a file; name the files one by one.")
        if stat.st_size == 0:
            raise PromptError(f"{path} is empty.")
        return _known_digest(path.absolute(), stat.st_size, stat.st_mtime_ns)
    except FileNotFoundError as error:
        raise PromptError(f"The prompt file {path} does not exist (looked for in {Path.cwd()}).") from error
    except PermissionError as error:
        raise PromptError(f"The prompt file {path} may not be read: {error.strerror}.") from error


@lru_cache(maxsize=256)
def _known_digest(path: Path, size: int, modified_ns: int) -> str:
    del size, modified_ns
    return file_sha256(path)
