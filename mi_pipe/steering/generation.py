"""Continuations of prompts while a direction is added: greedy, or sampled from fixed random numbers.

Steps:
1. run the prompts of one length with the direction added, keeping keys and values where the model has such a cache;
2. take the next token of each row: the likeliest, or by inverse transform the one whose interval of the cumulative
   probabilities holds the row's random number;
3. run the new tokens alone (without a cache: everything again), the direction added to them too; and so on.

Every coefficient gets the same random numbers, so that differences between texts come from steering. Exact for models
whose cached runs are their whole runs, which holds for the HuggingFace models of the tests and of transformers'
`generate`.
"""

from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from mi_pipe.models.model import Model
from mi_pipe.patching.readout import last_logits
from mi_pipe.steering.adding import added

_STREAM = 0x57EE


@dataclass(frozen=True)
class Push:
    """What is added while text is written."""

    hook: str
    vectors: Float[Tensor, "row d"]
    from_end: bool
    """From the prompt's last token on, instead of at every position."""


@dataclass(frozen=True)
class Sampling:
    """Random numbers of each row, NaN for greedy rows, and the temperature of the others."""

    draws: Float[np.ndarray, "row n_tokens"]
    temperature: float = 1.0


def uniform_draws(seed: int, prompt: int, sample: int, n_tokens: int) -> Float[np.ndarray, " n_tokens"]:
    """Return the random numbers of one continuation, a function of the arguments alone."""
    sequence = np.random.SeedSequence([seed, _STREAM, prompt, sample])
    return np.random.Generator(np.random.Philox(sequence)).random(n_tokens)


@torch.no_grad()
def continuations(
    model: Model, tokens: Int[Tensor, "row pos"], sampling: Sampling, push: Push | None = None
) -> list[list[int]]:
    """Return the tokens that follow each prompt, as many as there are draws, or up to and with an end-of-text token."""
    tokens = tokens.to(model.device)
    n_prompt, n_new = tokens.shape[1], sampling.draws.shape[1]
    cache = _cache_of(model)
    written = torch.empty(len(tokens), 0, dtype=torch.long, device=model.device)
    ends = _end_tokens(model)
    for i in range(n_new):
        known = torch.cat([tokens, written], dim=1)
        n_cached = n_prompt + i - 1 if cache is not None and i else 0
        logits = _next_logits(model, known, n_cached, n_prompt, cache, push)
        if cache is not None and not i and cache.get_seq_length() != n_prompt:
            cache = None
        written = torch.cat([written, _chosen(logits, sampling, i)[:, None]], dim=1)
        if ends and all(ends.intersection(row) for row in written.tolist()):
            break
    return [_until_end(row, ends) for row in written.tolist()]


def _next_logits(
    model: Model, known: Int[Tensor, "row pos"], n_cached: int, n_prompt: int, cache: Any, push: Push | None
) -> Float[Tensor, "row d_vocab"]:
    options = {} if cache is None else {"past_key_values": cache, "use_cache": True}
    new = known[:, n_cached:]
    if push is None:
        return last_logits(model, new, **options)
    first = max(0, n_prompt - 1 - n_cached) if push.from_end else 0
    with added(model, push.hook, push.vectors.to(model.device), first):
        return last_logits(model, new, **options)


def _chosen(logits: Float[Tensor, "row d_vocab"], sampling: Sampling, i: int) -> Int[Tensor, " row"]:
    likeliest = logits.argmax(-1)
    draws = torch.from_numpy(sampling.draws[:, i])
    if bool(draws.isnan().all()):
        return likeliest
    cumulative = (logits.double().cpu() / sampling.temperature).softmax(-1).cumsum(-1)
    reached = (draws.nan_to_num(0.0)[:, None] * cumulative[:, -1:]).contiguous()
    sampled = torch.searchsorted(cumulative, reached, right=True).squeeze(1).clamp_max(logits.shape[-1] - 1)
    return torch.where(draws.isnan().to(likeliest.device), likeliest, sampled.to(likeliest.device))


def _cache_of(model: Model) -> DynamicCache | None:
    """Return an empty cache, or None for models without one; some that are given one leave it empty (state spaces)."""
    from transformers import PreTrainedModel  # takes seconds to import

    module = model.module
    if not isinstance(module, PreTrainedModel) or "past_key_values" not in signature(module.forward).parameters:
        return None
    return DynamicCache(config=module.config)


def _end_tokens(model: Model) -> set[int]:
    """Return the tokens after which a HuggingFace model stops writing; none for toys."""
    found: Any = None
    for name in ("generation_config", "config"):
        config = getattr(model.module, name, None)
        found = getattr(config, "eos_token_id", None) if found is None else found
    return set() if found is None else {found} if isinstance(found, int) else set(found)


def _until_end(row: list[int], ends: set[int]) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
    return row[:stop]
