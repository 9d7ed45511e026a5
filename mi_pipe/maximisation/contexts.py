"""The text around a token, the token itself in «guillemets»."""

from collections.abc import Sequence

import numpy as np

from mi_pipe.activations.store import ActivationStore
from mi_pipe.prompts.prompt_set import PromptSet


def marked(texts: Sequence[str], here: int, before: int, after: int) -> str:
    r"""Return up to `before` tokens before one and `after` after it, newlines as ↵.

    >>> marked(["When", " Mary", " and", " John"], 1, 5, 1)
    'When« Mary» and'
    >>> marked(["def", "\n", "x"], 2, 5, 5)
    'def↵«x»'
    """
    shown = [text.replace("\n", "↵") for text in texts]
    start = max(0, here - before)
    return f"{''.join(shown[start:here])}«{shown[here]}»{''.join(shown[here + 1 : here + 1 + after])}"


def context_of_row(store: ActivationStore, row: int, before: int, after: int) -> str:
    """Return the text around a row of a store, as far as the tokens of its prompt have rows."""
    prompt = int(np.searchsorted(store.prompt_offset, row, "right")) - 1
    first, last = (int(edge) for edge in store.prompt_offset[prompt : prompt + 2])
    rows = np.arange(max(first, row - before), min(last, row + after + 1))
    texts = store.token_table.take(rows, ["text"])["text"].astype(str).tolist()
    return marked(texts, row - int(rows[0]), before, after)


def context_of_token(prompts: PromptSet, prompt: int, pos: int, before: int, after: int) -> str:
    """Return the text around a token of a prompt set."""
    return marked(prompts.texts(prompt), pos, before, after)
