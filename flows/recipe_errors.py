"""Mistakes in a recipe, told in one sentence with the line and the nearest name."""

from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from mi_pipe.core.errors import near_names

KeyPath = tuple[str, ...]
_MOST = 3


def key_lines(text: str) -> dict[KeyPath, int]:
    """Return the line (from 1) of every key of a YAML text, by its path."""
    lines: dict[KeyPath, int] = {}
    root = yaml.compose(text)
    if root is not None:
        _collect(root, (), lines)
    return lines


def _collect(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            lines[here] = key.start_mark.line + 1
            _collect(value, here, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            here = (*path, str(index))
            lines[here] = value.start_mark.line + 1
            _collect(value, here, lines)


def explain(error: ValidationError, root: type[BaseModel], lines: dict[KeyPath, str], file: str) -> str:
    """Return what is wrong, at most three mistakes, each with its place and what would be right."""
    told = [_explain_one(entry, root, lines, file) for entry in error.errors()[:_MOST]]
    more = len(error.errors()) - len(told)
    return " ".join(told) + (f" And {more} more." if more > 0 else "")


def _explain_one(entry: Any, root: type[BaseModel], lines: dict[KeyPath, str], file: str) -> str:
    path = _known_path(tuple(str(part) for part in entry["loc"]), lines)
    place = next((lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in lines), file)
    name = ".".join(path)
    if entry["type"] == "extra_forbidden":
        known = fields_at(root, tuple(str(part) for part in entry["loc"])[:-1])
        near = near_names(path[-1], known)
        keys = ", ".join(sorted(known))
        return f"{place}: unknown key {name!r}.{near or f' Keys there: {keys}.'}"
    if entry["type"] == "missing":
        return f"{place}: {name!r} is missing."
    shown = repr(entry["input"])
    limit = 60
    shown = shown if len(shown) <= limit else shown[: limit - 3] + "..."
    message = entry["msg"].removeprefix("Value error, ").rstrip(".")
    return f"{place}: {name!r} is {shown}; {message[:1].lower() + message[1:]}."


def _known_path(loc: KeyPath, lines: dict[KeyPath, str]) -> KeyPath:
    """Drop the parts of a location that are names of union members, not keys of the file."""
    path: KeyPath = ()
    for i, part in enumerate(loc):
        is_last = i == len(loc) - 1
        if (*path, part) in lines or is_last or not any(key[: len(path)] == path for key in lines):
            path = (*path, part)
    return path


def fields_at(root: type[BaseModel], loc: KeyPath) -> list[str]:
    """Return the field names of the config found at a location, looking into unions by tag or index."""
    candidates: list[Any] = [root]
    for part in loc:
        models = _models(candidates)
        deeper = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        tagged = [model for model in models if _has_tag(model, part)]
        candidates = deeper or tagged or candidates
    return sorted({name for model in _models(candidates) for name in model.model_fields})


def _models(annotations: list[Any]) -> list[type[BaseModel]]:
    found: list[type[BaseModel]] = []
    for annotation in annotations:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found.append(annotation)
        else:
            found += _models(list(get_args(annotation)))
    return found


def _has_tag(model: type[BaseModel], tag: str) -> bool:
    return any(tag in get_args(field.annotation) for field in model.model_fields.values())
