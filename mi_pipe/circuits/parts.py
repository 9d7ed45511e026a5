"""Where the parts of the graph lie in a model's own modules.

Hook points name most of them. Models that compute q, k and v with one fused projection (GPT-2, GPT-NeoX)
have no module for each, so `_FUSED` says which rows of the fused weight belong to which head. That a model adds
what its parts write to the residual stream as it is, is checked on real prompts by `recording`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from mi_pipe.circuits.graph import Graph
from mi_pipe.core.errors import StageError
from mi_pipe.models.hook_points import HookMap
from mi_pipe.models.info import ModelInfo
from mi_pipe.models.model import Model

SUPPORTED = (
    "models whose blocks add attention and MLP to the residual stream unchanged and have separate q, k, v "
    "projections (Llama, Mistral, Qwen, SmolLM, GPT-J, Phi, TransformerLens native), GPT-2 and GPT-NeoX"
)
_CONV_1D = "Conv1D"


@dataclass(frozen=True)
class Projection:
    """A linear map of a block's normalised input to q, k or v of some heads."""

    module: nn.Module
    first_reader: int
    """Its first reader, counted from the layer's first q."""
    rows: Int[Tensor, "reader d_head"]
    """Which of its outputs each reader's q, k or v is."""

    @property
    def n_readers(self) -> int:
        """How many readers it computes."""
        return self.rows.shape[0]

    def weight(self) -> Float[Tensor, "reader d_head d_model"]:
        """Its weight by reader."""
        return _outputs_first(self.module)[self.rows]

    def of_reader(self, reader: int, normed: Float[Tensor, "pair pos d_model"]) -> Float[Tensor, "pair pos d_head"]:
        """Return one reader's q, k or v, bias included, of its normalised input."""
        rows, bias = self.rows[reader], getattr(self.module, "bias", None)
        return nn.functional.linear(normed, _outputs_first(self.module)[rows], None if bias is None else bias[rows])


@dataclass(frozen=True)
class Block:
    """The parts of one transformer block."""

    attention_norm: nn.Module
    projections: tuple[Projection, ...]
    output: nn.Module
    """The projection of the heads' outputs to the residual stream."""
    mlp_norm: nn.Module | None
    n_heads: int

    def head_weights(self) -> Float[Tensor, "head d_head d_model"]:
        """W_O by head; its bias belongs to no head."""
        return rearrange(_outputs_first(self.output), "m (h k) -> h k m", h=self.n_heads)


@dataclass(frozen=True)
class Parts:
    """The parts of a model, and its graph."""

    model: Model
    graph: Graph
    blocks: tuple[Block, ...]


def check_supported(hooks: HookMap, info: ModelInfo) -> None:
    """Raise StageError if the model has parts that circuits cannot address; needs no weights."""
    needed = [*(f"attn.{name}.hook_out" for name in "qkv"), "attn.o.hook_in", "ln1.hook_in"]
    needed += [] if info.attn_only else ["mlp.hook_in", "mlp.hook_out"]
    for layer in range(info.n_layers):
        for name in (f"blocks.{layer}.{part}" for part in needed):
            is_fused = info.architecture in _FUSED and name.split(".")[-2] in "qkv"
            if name not in hooks or (hooks[name].module_path is None and not is_fused):
                raise _unsupported(info.architecture, f"it has no module for {name}")


def find_parts(model: Model) -> Parts:
    """Find the parts of a loaded model; raises StageError for an architecture that is not supported."""
    check_supported(model.hooks, model.info)
    graph = Graph.of(model.info)
    return Parts(model, graph, tuple(_block(model, layer) for layer in range(graph.n_layers)))


def _block(model: Model, layer: int) -> Block:
    def module(name: str) -> nn.Module:
        return model.submodule(model.hooks[f"blocks.{layer}.{name}"].module_path or "")

    own_norm = f"blocks.{layer}.ln2.hook_in" in model.hooks
    return Block(
        attention_norm=module("ln1.hook_in"),
        projections=_FUSED.get(model.info.architecture, _separate)(model, layer),
        output=module("attn.o.hook_in"),
        # Parallel blocks may have one normalisation for both.
        mlp_norm=None if model.info.attn_only else module("ln2.hook_in" if own_norm else "ln1.hook_in"),
        n_heads=model.info.n_heads,
    )


def _separate(model: Model, layer: int) -> tuple[Projection, ...]:
    info = model.info
    counts = {"q": info.n_heads, "k": info.n_kv_heads, "v": info.n_kv_heads}
    projections: list[Projection] = []
    first = 0
    for name, count in counts.items():
        module = model.submodule(model.hooks[f"blocks.{layer}.attn.{name}.hook_out"].module_path or "")
        rows = torch.arange(count * info.d_head, device=model.device).view(count, info.d_head)
        projections.append(Projection(module, first, rows))
        first += count
    return tuple(projections)


def _fused_by_kind(model: Model, layer: int) -> tuple[Projection, ...]:
    """GPT-2: all of q, then all of k, then all of v."""
    info = model.info
    rows = torch.arange(3 * info.n_heads * info.d_head, device=model.device).view(-1, info.d_head)
    return (Projection(_child(model, layer, "c_attn"), 0, rows),)


def _fused_by_head(model: Model, layer: int) -> tuple[Projection, ...]:
    """GPT-NeoX: q, k and v of the first head, then of the second, and so on."""
    info = model.info
    rows = torch.arange(3 * info.n_heads * info.d_head, device=model.device)
    rows = rearrange(rows, "(h kind d) -> (kind h) d", kind=3, d=info.d_head)
    return (Projection(_child(model, layer, "query_key_value"), 0, rows),)


def _child(model: Model, layer: int, name: str) -> nn.Module:
    path = model.hooks[f"blocks.{layer}.attn.hook_out"].module_path or ""
    return model.submodule(f"{path}.{name}")


_FUSED: dict[str, Callable[[Model, int], tuple[Projection, ...]]] = {
    "GPT2LMHeadModel": _fused_by_kind,
    "GPTNeoXForCausalLM": _fused_by_head,
}


def _outputs_first(module: nn.Module) -> Float[Tensor, "d_out d_in"]:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.T if type(module).__name__ == _CONV_1D else weight


def _unsupported(architecture: str, why: str) -> StageError:
    return StageError(f"No circuits for {architecture}: {why}. Supported are {SUPPORTED}.")
