"""Prompts: a corpus in windows, or a task in clean and corrupted pairs, tokenised for one model.

Tokenising is cheap enough (millions of tokens in seconds) to be redone whole after a kill, so there is one unit.
"""

from dataclasses import dataclass

import numpy as np

from mi_pipe.core.errors import PromptError
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.stage import Estimate, Stage
from mi_pipe.core.workspace import Workspace
from mi_pipe.models.source import ModelSource, source_hooks, source_vocabulary
from mi_pipe.prompts.config import PromptConfig
from mi_pipe.prompts.encoded import EncodedPrompts
from mi_pipe.prompts.families import AnyPromptConfig, encode_prompts
from mi_pipe.prompts.prompt_set import DROPPED_FILE, PROMPTS_FILE, TOKENS_FILE

__all__ = ["STAGE", "AnyPromptConfig", "Inputs"]

_TOKEN_BYTES = 4
"""Bytes a token takes in `tokens.parquet`, compressed; measured 3.3 on text and 2.1 on random tokens."""


@dataclass(frozen=True)
class Inputs:
    """What prompts are made for."""

    model: ModelSource


def estimate(config: PromptConfig, inputs: Inputs) -> Estimate:
    """Return the size of the token table."""
    del inputs
    return Estimate(size_bytes=config.n_tokens_expected * _TOKEN_BYTES, n_units=1, unit="table")


def run(config: PromptConfig, inputs: Inputs, work: Workspace) -> dict[str, Scalar]:
    """Tokenise and write; raises PromptError if prompts cannot be read, expressed, or are too long."""
    work.ledger.expect(1)
    vocabulary = source_vocabulary(inputs.model)
    prompts = encode_prompts(config, vocabulary, work.progress)
    _check_lengths(prompts, inputs.model)
    work.write_table(TOKENS_FILE, prompts.token_frame(vocabulary))
    work.write_table(PROMPTS_FILE, prompts.prompt_frame())
    work.write_json(DROPPED_FILE, prompts.dropped)
    work.progress.update(1, 1, "table", f"{prompts.n_tokens:,} tokens")
    return {
        "family": str(config.identity()["family"]),
        "prompts": prompts.n_prompts,
        "tokens": prompts.n_tokens,
        "longest": int(np.diff(prompts.offsets).max()),
        "dropped": sum(prompts.dropped.values()),
    }


def _check_lengths(prompts: EncodedPrompts, model: ModelSource) -> None:
    if prompts.n_prompts == 0:
        raise PromptError("No prompt is left: the model's tokenizer can express none of them as the task needs.")
    longest = int(np.diff(prompts.offsets).max())
    n_ctx = source_hooks(model)[1].n_ctx
    if longest > n_ctx:
        raise PromptError(
            f"Prompts of {longest} tokens do not fit into the model, which reads {n_ctx} at most. "
            "Ask for shorter windows, sequences or periods."
        )


STAGE = Stage(name="generate_prompts", version=1, config=PromptConfig, inputs=Inputs, run=run, estimate=estimate)
