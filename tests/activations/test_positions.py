"""Which tokens become rows."""

import numpy as np
import pandas as pd
import pytest

from mi_pipe.activations.harvest.positions import at_positions, kept_tokens
from mi_pipe.core.errors import ConfigError

LENGTHS = [5, 0, 3, 1, 9]
OFFSETS = np.concatenate([[0], np.cumsum(LENGTHS)])
IDS = np.array([7, 1, 2, 3, 4, 7, 2, 2, 7, 1, 7, 3, 3, 2, 1, 4, 4, 2], np.int32)
PROMPT = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
POS = np.concatenate([np.arange(n) for n in LENGTHS])


@pytest.fixture
def tables(tmp_path):
    tokens = pd.DataFrame({"prompt_idx": PROMPT, "pos": POS, "token_id": IDS})
    tokens["text"] = pd.Categorical([f" t{i}" for i in IDS])
    prompts = pd.DataFrame({"prompt_idx": range(len(LENGTHS)), "n_tokens": LENGTHS, "pos_end": np.array(LENGTHS) - 1})
    tokens.to_parquet(tmp_path / "tokens.parquet")
    prompts.to_parquet(tmp_path / "prompts.parquet")
    return tmp_path / "tokens.parquet", tmp_path / "prompts.parquet"


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("all", np.ones(len(IDS), bool)),
        ("last", np.array([POS[i] == LENGTHS[PROMPT[i]] - 1 for i in range(len(IDS))])),
        ("every 1", np.ones(len(IDS), bool)),
        ("every 3", POS % 3 == 0),
        ("token == ' t2' or pos > 6", (IDS == 2) | (POS > 6)),
        ("pos == pos_end", np.array([POS[i] == LENGTHS[PROMPT[i]] - 1 for i in range(len(IDS))])),
        ("n_tokens >= 5 and token_id in [1, 4]", np.isin(IDS, [1, 4]) & np.isin(PROMPT, [0, 4])),
    ],
)
def test_words_and_conditions_choose_tokens(tables, positions, expected):
    found = at_positions(positions, np.ones(len(IDS), bool), OFFSETS, *tables)
    np.testing.assert_array_equal(found, expected)
    kept = kept_tokens(IDS, OFFSETS, 7, keep_bos=False)
    if not positions.startswith("every"):
        np.testing.assert_array_equal(at_positions(positions, kept, OFFSETS, *tables), expected & kept)


def test_every_counts_from_the_first_kept_token(tables):
    kept = kept_tokens(IDS, OFFSETS, 7, keep_bos=False)
    found = at_positions("every 3", kept, OFFSETS, *tables)
    # Prompts 0 and 2 begin with BOS (7), so they count from position 1; prompt 3 is BOS alone.
    assert [(int(PROMPT[i]), int(POS[i])) for i in np.flatnonzero(found)] == [
        (0, 1),
        (0, 4),
        (2, 1),
        (4, 0),
        (4, 3),
        (4, 6),
    ]


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ("first", r"none of all, last and every <n>.*no column 'first'"),
        ("every 0", "at least every 1"),
        ("posn > 3", "Did you mean 'pos'"),
        ("pos > ' a'", "is a number and"),
        ("__import__('os')", "cannot be"),
    ],
)
def test_what_chooses_nothing_that_can_be_understood_is_refused(tables, positions, message):
    with pytest.raises(ConfigError, match=message):
        at_positions(positions, np.ones(len(IDS), bool), OFFSETS, *tables)
