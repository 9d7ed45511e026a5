"""The two runs of path patching without any patch: what they had at every head, MLP and block."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from mi_pipe.attribution.atp import PairTokens
from mi_pipe.attribution.nodes import Kind, own_hook, sites_of
from mi_pipe.models.model import Model
from mi_pipe.patching.block_calls import KeysValues
from mi_pipe.patching.recording import record

ATTENTION, MLP = "attn.hook_out", "mlp.hook_out"
"""What a block's modules return, so that they need not be run again."""


@dataclass(frozen=True)
class PathRuns:
    """Values of base and donor run by hook point, each (pair, pos, width) with heads side by side."""

    base: dict[str, Tensor]
    """Of every block: what enters it, z, and what its attention and MLP return and add to the residual stream."""
    donor: dict[str, Tensor]
    """The embeddings, z and what MLPs add."""
    base_logits: Float[Tensor, "pair d_vocab"]
    donor_logits: Float[Tensor, "pair d_vocab"]
    keys_values: KeysValues | None
    """Of the base run, if the model keeps them."""
    first_change: int
    """The first position at which any pair's prompts differ, or the last."""

    def of_base(self, hook: str, pair: Int[Tensor, " row"], first_pos: int = 0) -> Float[Tensor, "row pos width"]:
        """Return the base run's values for rows of these pairs, from a position on."""
        return self.base[hook][pair, first_pos:]

    def of_donor(self, hook: str, pair: Int[Tensor, " row"], first_pos: int = 0) -> Float[Tensor, "row pos width"]:
        """Return the donor run's values for rows of these pairs, from a position on."""
        return self.donor[hook][pair, first_pos:]


@torch.no_grad()
def run_both(model: Model, pairs: PairTokens) -> PathRuns:
    """Run base and donor prompts and keep what path patching needs of them."""
    senders = _hooks(model, ["embed", "z", "mlp_out"])
    blocks = [f"blocks.{layer}.{name}" for layer in range(model.info.n_layers) for name in (ATTENTION, MLP)]
    kept = [hook for hook in blocks if hook in model.hooks and model.hooks[hook].module_path is not None]
    cache = DynamicCache()
    wanted = list(dict.fromkeys([*senders, *_hooks(model, ["resid_pre"]), *kept]))
    base_logits, base = record(model, pairs.base, wanted, past_key_values=cache, use_cache=True)
    donor_logits, donor = record(model, pairs.donor, senders, use_cache=False)
    changed = (pairs.base != pairs.donor).any(0)
    first = int(changed.int().argmax()) if changed.any() else pairs.base.shape[1] - 1
    return PathRuns(base, donor, base_logits, donor_logits, KeysValues.of_cache(cache), first)


def _hooks(model: Model, kinds: list[Kind]) -> list[str]:
    present: list[Kind] = [kind for kind in kinds if kind != "mlp_out" or not model.info.attn_only]
    return [own_hook(site, model.hooks) for site in sites_of(present, model.info)]
