"""Which neurons are patched: a list, or in each layer those that differ most between the two runs.

A neuron's rank is its change |a_donor - a_base|, averaged over pairs and positions, times the norm of what it writes:
how much it moves the residual stream, whatever is read of that.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.core.errors import ConfigError
from mi_pipe.models.model import Model
from mi_pipe.patching.block_parts import block_parts, inputs_first
from mi_pipe.patching.recording import record
from mi_pipe.prompts.prompt_set import PairGroup

_PAIRS_A_RUN = 16


def check_neurons(neurons: int | list[int], d_mlp: int | None) -> None:
    """Raise ConfigError for neurons that no layer has."""
    largest = neurons - 1 if isinstance(neurons, int) else max(neurons)
    if d_mlp is not None and largest >= d_mlp:
        raise ConfigError(f"neurons: {largest} is asked for, and the model's MLPs have neurons 0 to {d_mlp - 1}.")


def chosen_neurons(model: Model, groups: Sequence[PairGroup], neurons: int | list[int]) -> Int[Tensor, "layer neuron"]:
    """Return the neurons of each layer that are patched: those of the list, or the `neurons` that differ most."""
    if isinstance(neurons, list):
        return torch.tensor(neurons).expand(model.info.n_layers, -1)
    scores = torch.stack(_changes(model, groups))
    return scores.topk(neurons, dim=1).indices.cpu()


def _changes(model: Model, groups: Sequence[PairGroup]) -> list[Float[Tensor, " neuron"]]:
    hooks = [f"blocks.{layer}.mlp.hook_post" for layer in range(model.info.n_layers)]
    sums = [torch.zeros((), device=model.device)] * len(hooks)
    for group in groups:
        for start in range(0, group.n_pairs, _PAIRS_A_RUN):
            rows = slice(start, start + _PAIRS_A_RUN)
            _, clean = record(model, group.clean[rows].to(model.device), hooks)
            _, corrupted = record(model, group.corrupted[rows].to(model.device), hooks)
            sums = [
                total + (clean[hook] - corrupted[hook]).abs().float().mean(1).sum(0)
                for total, hook in zip(sums, hooks, strict=True)
            ]
    norms = [_written_norms(model, layer) for layer in range(len(hooks))]
    return [total * norm for total, norm in zip(sums, norms, strict=True)]


def _written_norms(model: Model, layer: int) -> Float[Tensor, " neuron"]:
    projection = block_parts(model, layer).down_projection
    assert projection is not None, "hook_post is the input of a projection"
    return inputs_first(projection).float().norm(dim=1)
