"""How fast this machine fills a store: a few seconds of the harvest's own forward pass on random tokens."""

import time

import numpy as np

from mi_pipe.activations.harvest.forward import ForwardPass
from mi_pipe.activations.harvest.plan import Batch

_WARM_UP = 1


def tokens_per_s(forward: ForwardPass, d_vocab: int, length: int, batch_tokens: int, seconds: float = 3.0) -> float:
    """Return tokens a second over about `seconds`, at least two batches, the first of which is not counted.

    Batches are those of a harvest of prompts of `length` tokens; writing, which overlaps, is left out.
    """
    rng = np.random.default_rng(0)
    n_prompts = max(1, batch_tokens // length)
    n_batches, started = -_WARM_UP, time.perf_counter()
    while True:
        tokens = rng.integers(0, d_vocab, (n_prompts, length), dtype=np.int32)
        kept = np.ones(tokens.shape, bool)
        forward.start(Batch(0, tokens, kept, np.arange(tokens.size))).result()
        n_batches += 1
        if n_batches == 0:
            started = time.perf_counter()
        elif time.perf_counter() - started >= seconds:
            return n_batches * n_prompts * length / (time.perf_counter() - started)
