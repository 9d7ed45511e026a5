"""What a harvest stores, decided before any weights load: its config, its plan, and what auto means on this machine."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mi_pipe.activations.harvest.batches import Batching, batch_tokens_for
from mi_pipe.activations.harvest.covariance_choice import CovarianceChoice, with_covariance
from mi_pipe.activations.harvest.fallback import Fallback
from mi_pipe.activations.harvest.filling import HarvestJob
from mi_pipe.activations.harvest.hook_selection import array_layouts, at_lengths, check_shard_rows, select_hooks
from mi_pipe.activations.harvest.plan import HarvestPlan
from mi_pipe.activations.harvest.positions import at_positions, kept_tokens
from mi_pipe.activations.harvest.precision import Precision, PrecisionChoice, pick_precision
from mi_pipe.activations.layout import StoreLayout, shard_rows_for
from mi_pipe.activations.row_table import TOKENS_FILE
from mi_pipe.activations.storage_dtype import StoreDType, numpy_dtype
from mi_pipe.activations.store import PROMPTS_FILE
from mi_pipe.activations.tokens import Tokens
from mi_pipe.core.config import Config, Execution
from mi_pipe.core.errors import PromptError
from mi_pipe.core.place import Place
from mi_pipe.models.device import pick_device
from mi_pipe.models.info import ModelInfo
from mi_pipe.models.source import ModelSource, source_hooks, source_vocabulary
from mi_pipe.prompts.prompt_set import PromptSet


@dataclass(frozen=True)
class Inputs:
    """What a harvest reads."""

    model: ModelSource
    prompts: PromptSet


class HarvestConfig(Config):
    """Which activations to store, and how exactly."""

    hooks: list[str] = Field(min_length=1)
    """Hook points by TransformerLens' names; several at once by `blocks.{3,7}.hook_resid_post` or `blocks.*.…`."""
    precision: PrecisionChoice = "auto"
    """What the model computes in: mixed (bfloat16 products, float32 residual stream), bfloat16, float32, or auto:
    mixed where the device has bfloat16 products, else float32."""
    store_dtype: StoreDType = "float16"
    """What is stored: float16, bfloat16 (as uint16 bits) or float32."""
    on_overflow: Literal["refuse", "bfloat16"] = "refuse"
    """If a value does not fit float16: stop with a clear error, or begin again storing bfloat16."""
    keep_bos: bool = False
    """Keep the row of the BOS token at the start of each prompt."""
    positions: str = Field(default="all", min_length=1)
    """Which tokens become rows: all, last (of each prompt), every 8 (the first, the ninth, ...), or a condition such as
    `token == ' Paris' or pos == pos_end` on the columns of the prompt set's tables."""
    massive_factor: float = Field(default=10.0, gt=1)
    """A row is massive if its norm is above this many median norms; statistics and training leave it out."""
    covariance: CovarianceChoice = "auto"
    """Which hook points' covariances are kept with the statistics: always (all), never, or auto: those up to 1,024 wide
    where all together cost at most 1 % of the forward pass."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens of one forward pass; part of the result, because what is in a batch changes the last bits. By default
    1,024 on a CPU, whose caches they fit, and 16,384 on a GPU; every batch is halved where that is too much."""
    shard_rows: int | None = Field(default=None, ge=1)
    """Rows of a shard, a power of two; by default at most 134 MB, and less for small stores."""
    device: Annotated[str, Execution()] = "auto"
    """Device of the model: auto, cuda, mps or cpu."""
    destination: Annotated[str | None, Execution()] = None
    """URL of an object store to write to (`s3://bucket/prefix`); by default the store's own folder."""


def make_job(config: HarvestConfig, inputs: Inputs, place: Place, scratch: Place, fallback: Fallback) -> HarvestJob:
    """Return the plan with the places of its shards and of their sums."""
    return HarvestJob(make_plan(config, inputs, fallback), place, scratch)


def make_plan(config: HarvestConfig, inputs: Inputs, fallback: Fallback) -> HarvestPlan:
    """Return the plan; raises HookPointError, ConfigError or PromptError for what cannot be done."""
    check_shard_rows(config.shard_rows)
    hooks, info = source_hooks(inputs.model)
    sites = select_hooks(config.hooks, hooks)
    prompts = inputs.prompts
    ids, offsets = np.asarray(prompts.token_ids), np.asarray(prompts.offsets, np.int64)
    kept = kept_tokens(ids, offsets, source_vocabulary(inputs.model).bos_id, config.keep_bos)
    kept = at_positions(config.positions, kept, offsets, prompts.file(TOKENS_FILE), prompts.file(PROMPTS_FILE))
    tokens = Tokens(ids, offsets, kept)
    _check_tokens(tokens, info.n_ctx, info.d_vocab, prompts.id)
    sites = at_lengths(sites, tokens.lengths)
    widest = max(site.width for site in sites) * numpy_dtype(fallback.store_dtype).itemsize
    shard_rows = config.shard_rows or shard_rows_for(tokens.n_rows, widest, len(tokens.ids))
    arrays = array_layouts(sites, info, fallback.store_dtype, shard_rows)
    layout = StoreLayout(tokens.n_rows, shard_rows, arrays, with_covariance(config.covariance, sites, info))
    identity = {"model": inputs.model.digest, "precision": precision_of(config)}
    return HarvestPlan(tokens, layout, _batching(config, info, fallback), identity)


def _batching(config: HarvestConfig, info: ModelInfo, fallback: Fallback) -> Batching:
    batch_tokens = config.batch_tokens or batch_tokens_for(pick_device(config.device))
    return Batching(batch_tokens, may_pad=info.is_causal, halvings=fallback.halvings)


def _check_tokens(tokens: Tokens, n_ctx: int, d_vocab: int, prompts: str) -> None:
    if tokens.n_rows == 0:
        raise PromptError(f"{prompts} has no token to store. Use other prompts or positions, or keep_bos: true.")
    longest = int(tokens.lengths.max())
    if longest > n_ctx:
        raise PromptError(f"{prompts} has a prompt of {longest:,} tokens; the model takes at most {n_ctx:,}.")
    largest = int(tokens.ids.max())
    if largest >= d_vocab:
        raise PromptError(
            f"{prompts} has token {largest:,}, the model's vocabulary ends at {d_vocab - 1:,}. "
            "Make the prompts with this model's tokenizer."
        )


def precision_of(config: HarvestConfig) -> Precision:
    """Return what the model computes in on this device."""
    return pick_precision(config.precision, pick_device(config.device))


def store_attributes(config: HarvestConfig, inputs: Inputs, fallback: Fallback) -> dict[str, Any]:
    """Return what the store says of itself: also what auto has meant here, so that its shards can be made again."""
    return {
        "model": inputs.model.id,
        "prompts": inputs.prompts.id,
        "precision": precision_of(config),
        "batch_tokens": config.batch_tokens or batch_tokens_for(pick_device(config.device)),
        "store_dtype": fallback.store_dtype,
        "halvings": fallback.halvings,
    }
