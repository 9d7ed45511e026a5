"""Packing: documents end to end, a separator between, cut into windows of one length, each after BOS.

The separator is a blank line and not a special token: language models put their attention sinks and massive
activations on special tokens, and with a blank line these stay at position 0 of every window. What is left
after the last whole window is not used.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int


@dataclass(frozen=True)
class Windows:
    """Windows of equal length."""

    tokens: Int[np.ndarray, "window pos"]
    """int32."""
    document: Int[np.ndarray, " window"]
    """Number of the document that each window's first token (after BOS) is from."""


def pack(
    documents: Sequence[Int[np.ndarray, " token"]], separator: Sequence[int], window: int, bos_id: int | None
) -> Windows:
    """Return all whole windows of the documents' tokens in order; a separator belongs to the document before it."""
    n_body = window - (bos_id is not None)
    tail = np.asarray(separator, np.int32)
    pieces = [piece for tokens in documents for piece in (tokens, tail)][:-1]
    stream = np.concatenate(pieces).astype(np.int32) if pieces else np.zeros(0, np.int32)
    n_windows = len(stream) // n_body
    body = stream[: n_windows * n_body].reshape(n_windows, n_body)
    starts = np.cumsum([0, *(len(tokens) + len(tail) for tokens in documents)])[:-1]
    document = np.searchsorted(starts, np.arange(n_windows) * n_body, side="right") - 1
    if bos_id is None:
        return Windows(body, document)
    return Windows(np.insert(body, 0, bos_id, axis=1), document)
