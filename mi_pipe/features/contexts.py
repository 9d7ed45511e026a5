"""The text around a firing: a window of its prompt's tokens with the feature's activation on each.

The window runs from `before` tokens before the row to `after` tokens after it, cut at the prompt's ends. Every
token of the prompt appears, also those whose activations are not stored (such as BOS) or were left out of scoring
(massive rows): there the activation is NaN, never 0.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int, Int32, Int64

from mi_pipe.features.firings import Firings

NOT_SCORED = -1


@dataclass(frozen=True)
class TokenMap:
    """Which token each row is, and which row, if any, each token of the prompts is."""

    token_ids: Int32[np.ndarray, " token"]
    """All prompts' tokens, one prompt after the other."""
    offsets: Int64[np.ndarray, " prompts_and_one"]
    """Where each prompt's tokens begin."""
    prompt_of_row: Int32[np.ndarray, " row"]
    pos_of_row: Int32[np.ndarray, " row"]
    row_of_token: Int64[np.ndarray, " token"]
    """NOT_SCORED where the token's activation was not stored, or was left out as massive."""

    @property
    def n_scored(self) -> int:
        """Number of rows that were encoded."""
        return int((self.row_of_token != NOT_SCORED).sum())

    @classmethod
    def build(
        cls,
        token_ids: Int32[np.ndarray, " token"],
        offsets: Int64[np.ndarray, " prompts_and_one"],
        prompt_of_row: Int[np.ndarray, " row"],
        pos_of_row: Int[np.ndarray, " row"],
        is_scored: Bool[np.ndarray, " row"],
    ) -> "TokenMap":
        """Make the map; `is_scored` says which stored rows were encoded."""
        row_of_token = np.full(len(token_ids), NOT_SCORED, np.int64)
        row_of_token[(offsets[prompt_of_row] + pos_of_row)[is_scored]] = np.flatnonzero(is_scored)
        return cls(token_ids, offsets, prompt_of_row.astype(np.int32), pos_of_row.astype(np.int32), row_of_token)


@dataclass(frozen=True)
class Windows:
    """Token windows one after the other; window i owns `starts[i]:starts[i + 1]` of the token arrays."""

    first_pos: Int32[np.ndarray, " window"]
    starts: Int64[np.ndarray, " windows_and_one"]
    token_ids: Int32[np.ndarray, " token"]
    activations: Float32[np.ndarray, " token"]
    """NaN where the token was not scored."""


def windows_around(
    firings: Firings,
    tokens: TokenMap,
    feature: Int[np.ndarray, " window"],
    row: Int[np.ndarray, " window"],
    before: int,
    after: int,
) -> Windows:
    """Return the window around each (feature, row)."""
    prompt = tokens.prompt_of_row[row]
    start_of_prompt, end_of_prompt = tokens.offsets[prompt], tokens.offsets[prompt + 1]
    here = start_of_prompt + tokens.pos_of_row[row]
    first = np.maximum(here - before, start_of_prompt)
    lengths = np.minimum(here + after + 1, end_of_prompt) - first
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    token = np.repeat(first - starts[:-1], lengths) + np.arange(starts[-1])
    window_row = tokens.row_of_token[token]
    activations = firings.at(np.repeat(feature, lengths), np.maximum(window_row, 0))
    activations[window_row == NOT_SCORED] = np.nan
    return Windows((first - start_of_prompt).astype(np.int32), starts, tokens.token_ids[token], activations)
