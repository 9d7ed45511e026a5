"""Which prompts of a set a condition means, and which are held out from contrasts for the loss on text."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Int

from mi_pipe.activations.where import Column, Condition, Texts
from mi_pipe.core.errors import PromptError
from mi_pipe.prompts.prompt_set import PromptSet
from mi_pipe.steering.batches import Tokens

_STREAM = 0x7E57


def prompts_where(prompts: PromptSet, where: str, max_prompts: int | None) -> Int[np.ndarray, " prompt"]:
    """Return the first prompts that fulfil a condition on the columns of `prompts.parquet`, ascending.

    Raises ConfigError for a condition without meaning, PromptError if no prompt fulfils it.
    """
    condition = Condition(where, list(prompts.prompts.columns))
    columns = {name: _column(pd.Series(prompts.prompts[name])) for name in condition.columns}
    found = np.flatnonzero(condition.mask(columns, prompts.n_prompts))[:max_prompts]
    if not len(found):
        raise PromptError(f"No prompt of {prompts.id} fulfils the condition {where!r}.")
    return found


def held_out(
    prompts: PromptSet, n_prompts: int, seed: int, without: Sequence[Tokens] = ()
) -> Int[np.ndarray, " prompt"]:
    """Return up to `n_prompts` prompts of at least two tokens, a random choice, ascending.

    Prompts with the tokens of one of `without` are left out, whichever set that is from. Raises PromptError if none is
    left.
    """
    used = {_key(prompt) for prompt in without}
    lengths = np.diff(prompts.offsets)
    allowed = np.array([i for i in np.flatnonzero(lengths > 1) if not used or _key(prompts.prompt(int(i))) not in used])
    if not len(allowed):
        raise PromptError(f"{prompts.id} has no prompts left for the loss on text: contrasts use them all.")
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, _STREAM])))
    return np.sort(generator.permutation(allowed)[:n_prompts])


def _key(prompt: Tokens) -> bytes:
    return np.asarray(prompt, np.int64).tobytes()


def _column(values: pd.Series) -> Column:
    """Return a column as numbers, flags or references to strings; missing numbers are NaN."""
    if pd.api.types.is_bool_dtype(values):
        return values.fillna(False).to_numpy(bool)
    if pd.api.types.is_numeric_dtype(values):
        return values.to_numpy(np.float64, na_value=np.nan)
    codes, texts = pd.factorize(values)
    return Texts(codes.astype(np.int64), [str(text) for text in texts])
