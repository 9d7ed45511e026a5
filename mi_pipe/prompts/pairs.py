"""Task prompts: clean and corrupted pairs of equal length with the two answers that the metric compares."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from mi_pipe.core.vocabulary import Vocabulary
from mi_pipe.prompts.encoded import EncodedPrompts, encode_rows


@dataclass(frozen=True)
class Pair:
    """One item of a task, in tokens (BOS included where there is one)."""

    source: str
    """Template, relation or line that it came from."""
    clean: Sequence[int]
    corrupted: Sequence[int]
    answer: int
    """Token that follows the clean prompt."""
    wrong: int
    """Token that the metric sets against it."""
    positions: dict[str, int] = field(default_factory=dict)
    """Position of each named place of the clean prompt."""


def with_bos(vocabulary: Vocabulary, token_ids: Sequence[int], prepend_bos: bool) -> list[int]:
    """Return the tokens after BOS, where it is wanted and the model has one."""
    if not prepend_bos or vocabulary.bos_id is None:
        return list(token_ids)
    return [vocabulary.bos_id, *token_ids]


def encode_pairs(pairs: Sequence[Pair], vocabulary: Vocabulary, dropped: dict[str, int]) -> EncodedPrompts:
    """Return two prompts a pair, clean at even and corrupted at odd places."""
    rows = [np.asarray(row, np.int32) for pair in pairs for row in (pair.clean, pair.corrupted)]
    assert all(len(pair.clean) == len(pair.corrupted) for pair in pairs), "a pair has prompts of equal length"
    return encode_rows(rows, _table(pairs, vocabulary), dropped)


def _table(pairs: Sequence[Pair], vocabulary: Vocabulary) -> pd.DataFrame:
    n = len(pairs)
    columns: dict[str, object] = {
        "source": np.repeat(np.array([pair.source for pair in pairs], object), 2),
        "pair": np.repeat(np.arange(n, dtype=np.int32), 2),
        "role": np.tile(np.array(["clean", "corrupted"], object), n),
    }
    for name, ids in (("answer", [p.answer for p in pairs]), ("wrong", [p.wrong for p in pairs])):
        columns[f"{name}_id"] = np.repeat(np.array(ids, np.int32), 2)
        columns[name] = np.repeat(np.array([vocabulary.text(token) for token in ids], object), 2)
    for name in sorted({name for pair in pairs for name in pair.positions}):
        places = [pair.positions.get(name, pd.NA) for pair in pairs]
        columns[f"pos_{name}"] = pd.array(places, dtype="Int32").repeat(2)
    return pd.DataFrame(columns)
