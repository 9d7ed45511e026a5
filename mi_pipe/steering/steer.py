"""One call: what a model writes while a direction is added at some coefficients."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Int

from mi_pipe.core.vocabulary import Vocabulary
from mi_pipe.models.model import Model
from mi_pipe.prompts.encoded import encode_texts
from mi_pipe.prompts.pairs import with_bos
from mi_pipe.steering.direction import Direction, check_width
from mi_pipe.steering.texts import Writing, check_room, steered_texts


def steer(
    model: Model,
    direction: Direction,
    prompts: Sequence[str],
    coefficients: Sequence[float] = (-1.0, 0.0, 1.0),
    writing: Writing | None = None,
    prepend_bos: bool = True,
) -> pd.DataFrame:
    """Return one row a coefficient, prompt and sample: `prompt_text`, `text` and `token_ids` of the continuation.

    `sample` is -1 for the greedy continuation; the row of coefficient 0 is the model's own. Raises HookPointError,
    ConfigError or PromptError for a direction or prompts that do not fit the model.
    """
    writing = writing or Writing()
    check_width(model.hooks, direction)
    tokens = encode_prompts(model.vocabulary, prompts, prepend_bos)
    check_room(tokens, writing.n_tokens, model.info)
    frame = steered_texts(model, direction, sorted({*map(float, coefficients)}), tokens, writing)
    frame.insert(3, "prompt_text", [prompts[int(i)] for i in frame["prompt"]])
    return frame


def encode_prompts(
    vocabulary: Vocabulary, texts: Sequence[str], prepend_bos: bool = True
) -> list[Int[np.ndarray, " pos"]]:
    """Return the tokens of each text after BOS, where it is wanted and there is one; raises as `encode_texts` does."""
    rows = encode_texts(vocabulary, texts)
    return [np.array(with_bos(vocabulary, row, prepend_bos), np.int64) for row in rows]
