"""`tokens.parquet` of an activation store: one line a row, with the text of its token and which rows are massive."""

import numpy as np
import pandas as pd
from jaxtyping import Bool

from mi_pipe.activations.plan import Tokens

TOKENS_FILE = "tokens.parquet"
MASSIVE_PREFIX = "massive:"


def row_table(tokens: Tokens, texts: pd.Series, massive: dict[str, Bool[np.ndarray, " row"]]) -> pd.DataFrame:
    """Return the table; `texts` has one entry a token of the prompts, kept or not."""
    arrays = tokens.row_arrays()
    columns = {
        "row": np.arange(tokens.n_rows, dtype=np.int64),
        "prompt_idx": arrays["prompt_idx"],
        "pos": arrays["pos"],
        "token_id": arrays["token_id"],
        "text": texts.loc[tokens.kept].astype("category").reset_index(drop=True),
    }
    return pd.DataFrame({**columns, **{MASSIVE_PREFIX + hook: flags for hook, flags in massive.items()}})
