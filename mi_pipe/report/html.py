"""Rendering: templates with autoescape, JSON that is safe inside a script, and tokens made visible.

Every text that comes from a model, a prompt or a recipe goes through here: HTML by jinja2's autoescape, data by
`safe_json`, which leaves no character that could end a script element or a line of JavaScript.
"""

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mi_pipe.core.artifact import format_size

_UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
_NAMED = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
_INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
_DIGITS = 4
_LARGE = 1e6
_SMALL = 1e-3
_MINUTE_S = 60
_HOUR_S = 3600


def safe_json(value: Any) -> str:
    r"""Write `value` as compact JSON that can stand inside a script element; NaN and infinities become null.

    >>> safe_json({"token": "</script>", "x": float("nan")})
    '{"token":"\\u003c/script\\u003e","x":null}'
    """
    text = json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escape in _UNSAFE.items():
        text = text.replace(character, escape)
    return text


def data_script(key: str, payload: Any) -> str:
    """Return the text of a data file: a script that hands `payload` to the page under `key`.

    Pages opened from disk may not fetch files, but may load scripts; the page defines `miPipe.receive`.
    """
    return f"miPipe.receive({safe_json(key)},{safe_json(payload)});\n"


def visible(token: str) -> str:
    r"""Return a token's text with newlines, tabs and invisible characters shown by signs or escapes.

    >>> visible(" a\n"), visible("\u202e")
    (' a⏎', '\\u202e')
    """
    return "".join(_shown(character) for character in token)


def shortened(token: str, n_max: int = 24) -> str:
    """Return `visible(token)`, cut to at most `n_max` characters where it would not fit a figure."""
    text = visible(token)
    return text if len(text) <= n_max else f"{text[: n_max - 1]}…"


def slug(name: str) -> str:
    """Return `name` as part of a file name: letters, digits, dots, dashes and underscores.

    >>> slug("L1/resid post")
    'L1-resid-post'
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip(".-") or "unnamed"


def number(value: Any) -> str:
    """Write a number for reading: whole numbers with separators, others to four digits."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, str | bool):
        return str(value)
    if isinstance(value, int | np.integer):
        return f"{int(value):,}"
    value = float(value)
    if value.is_integer() and abs(value) < _LARGE:
        return f"{value:,.0f}"
    if _SMALL <= abs(value) < _LARGE:
        return f"{value:,.{_DIGITS}g}"
    return f"{value:.{_DIGITS - 1}g}"


def rounded(values: np.ndarray, digits: int = 5) -> list[Any]:
    """Return the array as nested lists with numbers of `digits` significant digits, NaN as None."""
    if values.ndim > 1:
        return [rounded(part, digits) for part in values]
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values.tolist()]


def seconds(value: float) -> str:
    """Write a duration: "0.4 s", "1 min 20 s", "2 h 5 min"."""
    if value < _MINUTE_S:
        return f"{value:.3g} s"
    minutes, rest = divmod(round(value), _MINUTE_S)
    if value < _HOUR_S:
        return f"{minutes} min {rest} s"
    return f"{minutes // _MINUTE_S} h {minutes % _MINUTE_S} min"


def render(template: str, context: Mapping[str, Any]) -> str:
    """Return the page that `templates/<template>` makes of `context`; an undefined name is an error."""
    return _environment().get_template(template).render(context)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("mi_pipe.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        json=lambda value: Markup(safe_json(value)),  # noqa: S704 - safe_json leaves no markup
        visible=visible,
        number=number,
        seconds=seconds,
        size=format_size,
        slug=slug,
    )
    return environment


def _shown(character: str) -> str:
    if character in _NAMED:
        return _NAMED[character]
    if unicodedata.category(character) in _INVISIBLE:
        return f"\\u{ord(character):04x}"
    return character


def _finite(value: Any) -> Any:
    """Turn numpy values into Python's, and numbers that JSON lacks into null."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _finite(value.tolist())
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        return _finite(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
