"""Canonical JSON and content hashes: the same value gives the same bytes on every machine."""

import hashlib
import json
from pathlib import Path
from typing import Any

ID_DIGITS = 16


def canonical_json(value: Any) -> bytes:
    """Encode `value` with sorted keys, no spaces, UTF-8, and no NaN or infinity.

    >>> canonical_json({"b": 1, "a": [1.5, None]})
    b'{"a":[1.5,null],"b":1}'
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def content_hash(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of `value`, as 64 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
