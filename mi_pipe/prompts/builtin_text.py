"""The corpus that every machine has: documentation and source of the Python that runs.

Files are parsed, never imported. Tests, tables of encodings, third-party packages and files written at
installation are left out; files come in the order of their names, and no text comes twice.
"""

import ast
import hashlib
import importlib.util
import platform
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Literal

from mi_pipe.core.canonical import content_hash
from mi_pipe.prompts.documents import Document

BuiltinName = Literal["documentation", "source_code", "both"]

_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "lib-dynload"}
)
_WRITTEN_AT_INSTALLATION = ("_sysconfigdata", "_sysconfig_vars", "sitecustomize", "usercustomize", "config-")
_TOPICS = "pydoc_data/topics.py"
_PROSE = "pydoc_data/"
"""Left out of the source code, for it holds the documentation as one literal."""


def builtin_documents(name: BuiltinName) -> list[Document]:
    """Return the documents of a built-in corpus, without exact repeats, in an order that depends on names alone."""
    found: list[Document] = []
    if name in ("documentation", "both"):
        found += [*_topics(), *_docstrings()]
    if name in ("source_code", "both"):
        found += _sources()
    return _distinct(found)


@lru_cache(maxsize=1)
def builtin_identity() -> dict[str, str]:
    """Return which Python gave the text, and the SHA-256 of the files that it is read from.

    Distributions of one version differ in what they ship, so the version alone would not do.
    """
    digests = [[name, hashlib.sha256(path.read_bytes()).hexdigest()] for name, path in library_files()]
    return {"python": f"{platform.python_implementation()} {platform.python_version()}", "text": content_hash(digests)}


def library_files() -> list[tuple[str, Path]]:
    """Return name (such as `asyncio/tasks.py`) and path of the standard library's source files, by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted((path.relative_to(root).as_posix(), path) for path in _walk(root))


def _walk(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.name in _LEFT_OUT or path.name.startswith(_WRITTEN_AT_INSTALLATION):
            continue
        if path.is_dir():
            yield from _walk(path)
        elif path.suffix == ".py":
            yield path


def _topics() -> Iterator[Document]:
    """Yield the language reference's topics that `help()` shows, a dict literal in one module."""
    for statement in _tree(dict(library_files()).get(_TOPICS)).body:
        if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(statement.value, ast.Dict):
            for topic, text in sorted(ast.literal_eval(statement.value).items()):
                yield Document(f"python topic {topic}", text.strip())


def _docstrings() -> Iterator[Document]:
    """Yield one document a module: its docstring and those of its classes and functions, each under its name."""
    seen: set[str] = set()
    for name, path in library_files():
        parts = [part for part in _named_docstrings(_tree(path)) if part not in seen]
        seen.update(parts)
        if parts:
            yield Document(f"python doc {_module_name(name)}", "\n\n".join(parts))


def _named_docstrings(tree: ast.Module) -> Iterator[str]:
    for node in (tree, *_definitions(tree.body)):
        text = (ast.get_docstring(node) or "").strip()
        if text:
            yield text if isinstance(node, ast.Module) else f"{node.name}: {text}"


def _definitions(body: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield classes and functions in the order they are written, also those within others, `if` and `try`."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
        for part in ("body", "orelse", "finalbody"):
            yield from _definitions(getattr(node, part, []))


def _sources() -> Iterator[Document]:
    for name, path in library_files():
        text = importlib.util.decode_source(path.read_bytes()).strip()
        if text and not name.startswith(_PROSE):
            yield Document(f"python source {name}", text)


def _tree(path: Path | None) -> ast.Module:
    return ast.parse(path.read_bytes()) if path else ast.Module(body=[], type_ignores=[])


def _module_name(file_name: str) -> str:
    return file_name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _distinct(documents: list[Document]) -> list[Document]:
    first = {document.text: document for document in reversed(documents)}
    return [document for document in documents if document.text and first[document.text] is document]
