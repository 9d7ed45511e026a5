"""Which tokens of the prompts become rows of a store.

`all`, `last` (of each prompt), `every 8` (the first of each prompt, the ninth, and so on), or a condition on the token
table and the prompt table, such as `token == ' Paris' or pos == pos_end` (mi_pipe/activations/where.py). A BOS at the
start of a prompt is left out before any of these, unless it is to be kept.
"""

import re
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from mi_pipe.activations.token_table import TokenTable
from mi_pipe.core.errors import ConfigError

_EVERY = re.compile(r"every\s+(\d+)")


def kept_tokens(
    ids: Int[np.ndarray, " token"], offsets: Int[np.ndarray, " boundary"], bos_id: int | None, keep_bos: bool
) -> Bool[np.ndarray, " token"]:
    """Say which tokens may become rows: all, or all but a BOS at the start of a prompt."""
    kept = np.ones(len(ids), bool)
    if bos_id is not None and not keep_bos:
        starts = offsets[:-1][np.diff(offsets) > 0]
        kept[starts] = ids[starts] != bos_id
    return kept


def at_positions(
    positions: str,
    kept: Bool[np.ndarray, " token"],
    offsets: Int[np.ndarray, " boundary"],
    tokens_path: Path,
    prompts_path: Path,
) -> Bool[np.ndarray, " token"]:
    """Say which of the kept tokens are at the positions asked for.

    The two paths are the prompt set's tables, read only for a condition. Raises ConfigError for what is none of the
    words above and no condition either.
    """
    if positions == "all":
        return kept
    if positions == "last":
        last = np.zeros_like(kept)
        last[offsets[1:][np.diff(offsets) > 0] - 1] = True
        return kept & last
    if (found := _EVERY.fullmatch(positions.strip())) is not None:
        return kept & _every(int(found.group(1)), kept, offsets)
    table = TokenTable(tokens_path, prompts_path)
    chosen = np.zeros_like(kept)
    try:
        chosen[table.rows(table.condition(positions))] = True
    except ConfigError as error:
        raise ConfigError(f"harvest.positions is none of all, last and every <n>. {error}") from error
    return kept & chosen


def _every(
    n: int, kept: Bool[np.ndarray, " token"], offsets: Int[np.ndarray, " boundary"]
) -> Bool[np.ndarray, " token"]:
    """Say which tokens come first, (n + 1)th, (2 n + 1)th and so on among the kept tokens of their prompt."""
    if n == 0:
        raise ConfigError("harvest.positions is 'every 0'; it has to be at least every 1.")
    before = np.concatenate([[0], np.cumsum(kept, dtype=np.int64)])
    in_prompt = before[:-1] - np.repeat(before[offsets[:-1]], np.diff(offsets))
    return in_prompt % n == 0
