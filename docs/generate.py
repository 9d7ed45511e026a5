"""Write what can be written from the code: docs/cli.md, docs/recipes.md and the README's file tree.

The commands' own --help, the config fields and the modules' docstrings are the sources.

python -m docs.generate            write
python -m docs.generate --check    fail if a page differs from the code
"""

import ast
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import click
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from flows.cli import cli
from flows.recipe import Recipe

ROOT = Path(__file__).parent.parent
_TREE_BEGIN = "<!-- tree: written by `python -m docs.generate` -->"
_TREE_END = "<!-- end of tree -->"


def cli_page() -> str:
    """Return the command reference."""
    parts = ["# Commands\n\nGenerated from `mi-pipe --help`; exit codes: 0 done, 1 failed, 2 usage, 130 interrupted.\n"]
    for path, command in _commands(("mi-pipe",), cli):
        context = click.Context(command, info_name=" ".join(path), terminal_width=100, max_content_width=100)
        parts.append(f"## {' '.join(path)}\n\n```\n{command.get_help(context).rstrip()}\n```\n")
    return "\n".join(parts)


def _commands(path: tuple[str, ...], command: click.Command) -> list[tuple[tuple[str, ...], click.Command]]:
    found = [(path, command)]
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            found += _commands((*path, name), child)
    return found


def recipes_page() -> str:
    """Return the reference of every section and field of a recipe."""
    parts = [
        "# Recipes\n\nGenerated from the config classes. A section that is there runs; an override is written "
        "`section.field=value`. Fields marked *how* change only how a result is computed, never the result.\n"
    ]
    for model, name in _sections(Recipe, "recipe"):
        doc = (model.__doc__ or "").strip().splitlines()[0]
        parts.append(f"## {name}\n\n{doc}\n\n| field | type | default | meaning |\n|---|---|---|---|")
        for field_name, field in model.model_fields.items():
            how = " *how*" if any(type(mark).__name__ == "Execution" for mark in field.metadata) else ""
            text = " ".join((field.description or "").split())
            parts.append(f"| `{field_name}`{how} | {_type(field.annotation)} | {_default(field)} | {text} |")
        parts.append("")
    return "\n".join(parts)


def _sections(model: type[BaseModel], name: str) -> list[tuple[type[BaseModel], str]]:
    found = [(model, name)]
    for field_name, field in model.model_fields.items():
        for child in _models(field.annotation):
            prefix = field_name if name == "recipe" else f"{name}.{field_name}"
            label = prefix if len(_models(field.annotation)) == 1 else f"{prefix} ({child.__name__})"
            if child not in [seen for seen, _ in found]:
                found += _sections(child, label)
    return found


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " or ".join(_type(part) for part in get_args(annotation) if part is not type(None))
    if origin is typing.Annotated:
        return _type(get_args(annotation)[0])
    if origin in (list, tuple):
        return f"list of {_type(get_args(annotation)[0])}"
    if origin is dict:
        return f"names to {_type(get_args(annotation)[1])}"
    return getattr(annotation, "__name__", str(annotation))


def _default(field: Any) -> str:
    if field.default is PydanticUndefined:
        return "" if field.default_factory is None else f"`{field.default_factory()}`"
    if isinstance(field.default, BaseModel):
        return "its defaults"
    return "" if field.default is None else f"`{field.default}`"


def readme() -> str:
    """Return the README with its file tree as the code is now."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    before, rest = text.split(_TREE_BEGIN)
    after = rest.split(_TREE_END)[1]
    return f"{before}{_TREE_BEGIN}\n{_tree()}{_TREE_END}{after}"


def _tree() -> str:
    lines = ["```"]
    for top in ("flows", "stages", "mi_pipe"):
        for folder in sorted({path.parent for path in (ROOT / top).rglob("*.py")}):
            lines.append(f"{folder.relative_to(ROOT).as_posix()}/")
            lines += [f"    {path.name:<24} {_phrase(path)}" for path in sorted(folder.glob("*.py"))]
    return "\n".join([*lines, "```", ""])


def _phrase(path: Path) -> str:
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.split(r"(?<=[.:;])\s", doc.strip().replace("\n", " "), maxsplit=1)[0].rstrip(".:;")


PAGES = {"docs/cli.md": cli_page, "docs/recipes.md": recipes_page, "README.md": readme}


def main(arguments: list[str]) -> int:
    """Write or check the pages; returns the exit code."""
    stale = []
    for name, make in PAGES.items():
        path, text = ROOT / name, make()
        if "--check" not in arguments:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
    if stale:
        sys.stderr.write(f"docs: {', '.join(stale)} differ from the code; run `python -m docs.generate`\n")
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
