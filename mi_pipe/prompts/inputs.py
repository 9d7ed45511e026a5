"""The small tables that task prompts are made from: `data/inputs/*.json` of a checkout, or of the installed package."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from mi_pipe.core.canonical import content_hash

_INSTALLED = Path(__file__).parent / "inputs"
_CHECKOUT = Path(__file__).parents[2] / "data" / "inputs"


@lru_cache(maxsize=8)
def read_input(name: str) -> dict[str, Any]:
    """Return the content of one table, such as "ioi.json"; do not change it."""
    folder = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
    return json.loads((folder / name).read_text(encoding="utf-8"))


def input_digest(name: str) -> str:
    """Return the hash of one table's content, for the ids of what is made from it."""
    return content_hash(read_input(name))
