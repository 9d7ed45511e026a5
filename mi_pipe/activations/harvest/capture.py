"""Activations of any torch module on an array of inputs, stored as a harvest is: for models outside TransformerLens.

    acts = capture(mlp, inputs, hooks=["layers.0", "layers.2.input"], store="data/store")

Hook points are module paths (`<path>` is the output, `<path>.input` the input). Row i is item i of the inputs: its
value at a hook point, flat. In the token table every item is a prompt of one token (`token_id` -1, `pos` 0, no text).
The artifact is known by the module's structure and weights and by the bytes of the inputs, so asking again costs no
pass; a killed capture goes on at the first shard that is not committed.
"""

import hashlib
import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Shaped
from pydantic import Field
from torch import Tensor, nn

from mi_pipe.activations.harvest.batches import Batching
from mi_pipe.activations.harvest.filling import HarvestJob
from mi_pipe.activations.harvest.finishing import finish_store
from mi_pipe.activations.harvest.hook_selection import array_layouts, check_shard_rows, select_hooks
from mi_pipe.activations.harvest.item_pass import ItemPass
from mi_pipe.activations.harvest.plan import HarvestPlan
from mi_pipe.activations.layout import StoreLayout, shard_rows_for
from mi_pipe.activations.row_table import row_table
from mi_pipe.activations.storage_dtype import StoreDType, numpy_dtype
from mi_pipe.activations.store import PRECISION_FILE, PROMPTS_FILE, ActivationStore
from mi_pipe.activations.tokens import Tokens
from mi_pipe.core.canonical import ID_DIGITS
from mi_pipe.core.config import Config
from mi_pipe.core.errors import ConfigError
from mi_pipe.core.manifest import Scalar
from mi_pipe.core.stage import Estimate, Stage, execute
from mi_pipe.core.store import Store
from mi_pipe.core.workspace import Workspace
from mi_pipe.models.hook_points import HookMap, HookSite
from mi_pipe.models.module_sites import module_sites

_PROBE_ITEMS = 2
_TABLE_BYTES_A_ROW = 24
_NO_TOKEN = -1


class CaptureConfig(Config):
    """What of a module's activations is stored."""

    hooks: list[str] = Field(min_length=1)
    """Module paths, `<path>.input` for a module's input; several at once by `layers.{0,2}` or `layers.*`."""
    store_dtype: StoreDType = "float32"
    """What is stored: float32, float16 or bfloat16 (as uint16 bits)."""
    massive_factor: float = Field(default=10.0, gt=1)
    """A row is massive if its norm is above this many median norms."""
    batch_rows: int = Field(default=1024, ge=1)
    """Items of one forward pass."""
    shard_rows: int | None = Field(default=None, ge=1)
    """Rows of a shard, a power of two; by default as a harvest chooses."""


@dataclass(frozen=True)
class HashedModule:
    """A module, known by its structure and the bytes of its parameters and buffers (not by its code)."""

    module: nn.Module
    digest: str

    @property
    def id(self) -> str:
        """`module-<hex>`."""
        return f"module-{self.digest[:ID_DIGITS]}"


@dataclass(frozen=True)
class HashedItems:
    """An array of inputs, known by its bytes."""

    values: Shaped[Tensor, "item *shape"]
    digest: str

    @property
    def id(self) -> str:
        """`items-<hex>`."""
        return f"items-{self.digest[:ID_DIGITS]}"


@dataclass(frozen=True)
class CaptureInputs:
    """What a capture reads."""

    model: HashedModule
    items: HashedItems


def capture(
    module: nn.Module,
    inputs: Shaped[Tensor, "item *shape"] | Shaped[np.ndarray, "item *shape"],
    hooks: Sequence[str],
    store: Store | str | os.PathLike[str] | None = None,
    *,
    label: str = "",
    **options: object,
) -> ActivationStore:
    """Return the activations of `module` on `inputs` at `hooks`, computed now unless the store has them.

    The module runs in evaluation mode on its own device and is left as it was. `options` are fields of
    `CaptureConfig`. Raises HookPointError for a path that it has not, or whose value has no axis for the items,
    ConfigError for wrong options or no items, and StorageOverflowError for values that do not fit `store_dtype`.
    """
    config = CaptureConfig.model_validate({"hooks": list(hooks), **options})
    values = torch.as_tensor(inputs).detach()
    if values.ndim == 0 or len(values) == 0:
        raise ConfigError("There are no inputs to capture activations of; give an array with one axis for the items.")
    known = CaptureInputs(
        HashedModule(module, _digest([repr(module)], (*module.named_parameters(), *module.named_buffers()))),
        HashedItems(values, _digest([], [("items", values)])),
    )
    with _evaluating(module):
        result = execute(STAGE, config, known, store if isinstance(store, Store) else Store(store), label=label)
    return ActivationStore(result.artifact.path)


def _digest(texts: Iterable[str], tensors: Iterable[tuple[str, Tensor]]) -> str:
    found = hashlib.sha256("\0".join(texts).encode())
    for name, tensor in tensors:
        found.update(f"\0{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


@contextmanager
def _evaluating(module: nn.Module) -> Generator[None]:
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _plan(config: CaptureConfig, inputs: CaptureInputs) -> tuple[HarvestPlan, list[HookSite]]:
    check_shard_rows(config.shard_rows)
    module, values = inputs.model.module, inputs.items.values
    device = next((parameter.device for parameter in module.parameters()), values.device)
    sites = select_hooks(config.hooks, HookMap((), module_sites(module, values[:_PROBE_ITEMS].to(device), n_axes=1)))
    n_items = len(values)
    shard_rows = config.shard_rows or shard_rows_for(
        n_items, max(site.width for site in sites) * numpy_dtype(config.store_dtype).itemsize
    )
    layout = StoreLayout(n_items, shard_rows, array_layouts(sites, None, config.store_dtype, shard_rows))
    tokens = Tokens(np.full(n_items, _NO_TOKEN, np.int32), np.arange(n_items + 1), np.ones(n_items, bool))
    identity = {"model": inputs.model.digest, "items": inputs.items.digest}
    return HarvestPlan(tokens, layout, Batching(config.batch_rows), identity), sites


def _estimate(config: CaptureConfig, inputs: CaptureInputs) -> Estimate:
    layout = _plan(config, inputs)[0].layout
    return Estimate(layout.size_bytes + layout.n_rows * _TABLE_BYTES_A_ROW, layout.n_shards, "shards")


def _run(config: CaptureConfig, inputs: CaptureInputs, work: Workspace) -> dict[str, Scalar]:
    plan, sites = _plan(config, inputs)
    job = HarvestJob(plan, work.place_at(None), work.scratch_at(None))
    attributes = {"model": inputs.model.id, "prompts": inputs.items.id, "store_dtype": config.store_dtype}
    job.prepare(work.scratch / "group", attributes)
    n_shards = plan.layout.n_shards
    todo = sorted(set(range(n_shards)) - set(job.commits()))
    work.ledger.expect(n_shards)
    source = ItemPass(inputs.model.module, inputs.items.values, sites, config.store_dtype)
    job.fill(source, todo, on_rows=lambda n: work.progress.update(n, plan.layout.n_rows, "rows"))
    texts = pd.Series(pd.Categorical.from_codes(np.zeros(plan.layout.n_rows, np.int8), [""]))
    work.write_table(PROMPTS_FILE, _prompt_table(plan.layout.n_rows))
    precision = {"precision": "as the module", "store_dtype": config.store_dtype, "reference": "", "hooks": {}}
    work.write_json(PRECISION_FILE, precision)
    figures = finish_store(
        work,
        job.place,
        job.scratch,
        plan.layout,
        job.commits().values(),
        config.massive_factor,
        lambda massive: row_table(plan.tokens, texts, massive),
    )
    return {**figures, "n_prompts": plan.layout.n_rows, "store_dtype": config.store_dtype}


def _prompt_table(n_items: int) -> pd.DataFrame:
    columns = {"prompt_idx": np.arange(n_items, dtype=np.int32), "n_tokens": np.ones(n_items, np.int32)}
    return pd.DataFrame({**columns, "source": pd.Categorical.from_codes(np.zeros(n_items, np.int8), ["item"])})


STAGE = Stage(name="capture", version=1, config=CaptureConfig, inputs=CaptureInputs, run=_run, estimate=_estimate)
