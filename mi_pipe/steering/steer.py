"""One call: what a model writes while a direction is added at some coefficients."""

import math
from collections.abc import Sequence

import pandas as pd

from mi_pipe.core.errors import ConfigError
from mi_pipe.models.model import Model
from mi_pipe.steering.batches import Prompts, check_room, encode_prompts
from mi_pipe.steering.direction import Direction, check_width
from mi_pipe.steering.texts import Writing, steered_texts


def steer(
    model: Model,
    direction: Direction,
    prompts: Prompts,
    coefficients: float | Sequence[float] = (-1.0, 0.0, 1.0),
    writing: Writing | None = None,
    prepend_bos: bool = True,
) -> pd.DataFrame:
    """Return one row a coefficient, prompt and sample: `prompt_text`, `text` and `token_ids` of the continuation.

    Prompts are texts, or rows of tokens as they are. `sample` is -1 for the greedy continuation; the row of coefficient
    0 is the model's own. Raises HookPointError, ConfigError or PromptError for a direction, coefficients or prompts
    that do not fit the model.
    """
    writing = writing or Writing()
    check_width(model.hooks, direction)
    wanted = [coefficients] if isinstance(coefficients, int | float) else coefficients
    chosen = sorted({float(coefficient) for coefficient in wanted})
    if not all(map(math.isfinite, chosen)):
        raise ConfigError(f"Coefficients are finite numbers, not {', '.join(f'{each:g}' for each in chosen)}.")
    tokens = encode_prompts(model.vocabulary, prompts, prepend_bos)
    check_room(tokens, writing.n_tokens, model.info)
    frame = steered_texts(model, direction, chosen, tokens, writing)
    given = [prompts] if isinstance(prompts, str) else prompts
    shown = [one if isinstance(one, str) else model.vocabulary.decode([int(token) for token in one]) for one in given]
    frame.insert(3, "prompt_text", [shown[int(i)] for i in frame["prompt"]])
    return frame
