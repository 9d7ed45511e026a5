"""Which tokens stand around the rows of a store, and what they are called, with as much as is known.

Prompts know all tokens. Without them (an import, a capture) the rows' own tokens are there, and a position without a
row, such as a BOS that was left out, is known by its place alone: its token is `UNKNOWN`, its text "". Texts come from
the model's tokenizer, else from the prompts, else from the store's token table.
"""

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int32, Int64

from mi_pipe.activations.store import ActivationStore
from mi_pipe.features.contexts import TokenMap
from mi_pipe.features.tables import TokenText
from mi_pipe.models.source import ModelSource, source_vocabulary
from mi_pipe.prompts.prompt_set import PromptSet

UNKNOWN = -1
_TEXT_COLUMNS = ["token_id", "text"]


def token_map(store: ActivationStore, prompts: PromptSet | None, is_scored: Bool[np.ndarray, " row"]) -> TokenMap:
    """Return which token each row is, and which tokens stand around it; `is_scored` says which rows are encoded."""
    token_ids, offsets = row_tokens(store) if prompts is None else (prompts.token_ids, prompts.offsets)
    return TokenMap.build(token_ids, offsets, store.prompt_idx, store.pos, is_scored)


def row_tokens(store: ActivationStore) -> tuple[Int32[np.ndarray, " token"], Int64[np.ndarray, " prompts_and_one"]]:
    """Return the tokens of all prompts as far as they have rows, and where each prompt begins and the last ends."""
    n_tokens = store.prompts["n_tokens"].to_numpy(np.int64)
    offsets = np.concatenate([[0], np.cumsum(n_tokens)])
    token_ids = np.full(offsets[-1], UNKNOWN, np.int32)
    token_ids[offsets[store.prompt_idx] + store.pos] = store.token_id
    return token_ids, offsets


def text_of_tokens(store: ActivationStore, prompts: PromptSet | None, model: ModelSource | None) -> TokenText:
    """Return what each token is called."""
    if model is not None:
        spelled = source_vocabulary(model).text
        return lambda token_id: "" if token_id == UNKNOWN else spelled(token_id)
    return texts_of(store.table(_TEXT_COLUMNS) if prompts is None else prompts.token_table())


def texts_of(table: pd.DataFrame) -> TokenText:
    """Return the texts that a table with `token_id` and `text` knows; any other token's is ""."""
    known = table.drop_duplicates("token_id")
    texts = dict(zip(known["token_id"].tolist(), known["text"].astype(str).tolist(), strict=True))
    return lambda token_id: texts.get(token_id, "")
