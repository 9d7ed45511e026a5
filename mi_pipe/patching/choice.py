"""Which neurons, or features of SAEs, are patched: a list, or in each layer those that differ most between the runs.

The rank of a neuron (a feature) is its change |a_donor - a_base|, averaged over pairs and positions, times the norm of
what it writes (its decoder row): how much it moves the residual stream, whatever is read of that.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mi_pipe.core.errors import ConfigError
from mi_pipe.models.model import Model
from mi_pipe.patching.block_parts import block_parts, inputs_first
from mi_pipe.patching.recording import record
from mi_pipe.prompts.prompt_set import PairGroup
from mi_pipe.saes.sae import SAE

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
    hooks = [f"blocks.{layer}.mlp.hook_post" for layer in range(model.info.n_layers)]
    changes = _changes(model, groups, dict.fromkeys(hooks, _as_it_is))
    scores = [changes[hook] * _written_norms(model, layer) for layer, hook in enumerate(hooks)]
    return torch.stack(scores).topk(neurons, dim=1).indices.cpu()


@torch.no_grad()
def chosen_features(
    model: Model, groups: Sequence[PairGroup], saes: Sequence[SAE], features: int | list[int]
) -> Int[Tensor, "sae feature"]:
    """Return the features of each SAE that are patched: those of the list, or the `features` that differ most."""
    if isinstance(features, list):
        return torch.tensor(features).expand(len(saes), -1)
    changes = _changes(model, groups, {sae.hook: sae.encode for sae in saes})
    scores = (changes[sae.hook] * sae.W_dec.norm(dim=1) for sae in saes)
    return torch.stack([score.topk(features).indices for score in scores]).cpu()


_Activations = Callable[[Float[Tensor, "pair pos width"]], Float[Tensor, "pair pos n"]]


def _changes(
    model: Model, groups: Sequence[PairGroup], read: Mapping[str, _Activations]
) -> dict[str, Float[Tensor, " n"]]:
    """Return by hook point the sum over pairs of each activation's mean absolute change over positions."""
    sums = {hook: torch.zeros((), device=model.device) for hook in read}
    for group in groups:
        for start in range(0, group.n_pairs, _PAIRS_A_RUN):
            rows = slice(start, start + _PAIRS_A_RUN)
            _, clean = record(model, group.clean[rows].to(model.device), list(read))
            _, corrupted = record(model, group.corrupted[rows].to(model.device), list(read))
            for hook, activations in read.items():
                change = activations(clean[hook]) - activations(corrupted[hook])
                sums[hook] = sums[hook] + change.abs().float().mean(1).sum(0)
    return sums


def _as_it_is(value: Tensor) -> Tensor:
    return value


def _written_norms(model: Model, layer: int) -> Float[Tensor, " neuron"]:
    projection = block_parts(model, layer).down_projection
    assert projection is not None, "hook_post is the input of a projection"
    return inputs_first(projection).float().norm(dim=1)
