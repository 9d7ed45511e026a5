"""What an SAE makes of values, taken apart and patched the slow way, by formulas written out here."""

import numpy as np
import torch

from mi_pipe.models.model import Model
from mi_pipe.prompts.prompt_set import PairGroup
from mi_pipe.saes.sae import SAE


def apart(sae: SAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return activations and error of x, by formulas written out here."""
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    if sae.rule.kind == "topk":
        smallest = pre.sort(dim=-1, descending=True).values[..., sae.k - 1 : sae.k]
        z = torch.where(pre >= smallest, pre, 0.0).clamp_min(0)
    else:
        z = torch.where(pre > sae.threshold, pre, 0.0)
    return z, x - (z @ sae.W_dec + sae.b_dec)


@torch.no_grad()
def brute_force(
    model: Model, group: PairGroup, sae: SAE, direction: str, unit: str, chosen, ablated=None
) -> np.ndarray:
    """Patch each pair and cell alone: hooks, whole forward passes, `ablated` (z, e) instead of the donor run's."""
    base, donor = (group.corrupted, group.clean) if direction == "denoising" else (group.clean, group.corrupted)
    z, e = apart(sae, seen(model, sae.hook, base))
    new_z, new_e = ablated or apart(sae, seen(model, sae.hook, donor))
    cells = [None] if unit.startswith("sae_error") else list(chosen)
    positions = range(group.n_pos) if unit.endswith("_by_pos") else [slice(None)]
    out = np.zeros((len(base), len(cells), len(positions)), np.float32)
    for b, (i, feature), (j, pos) in (
        (b, c, p) for b in range(len(base)) for c in enumerate(cells) for p in enumerate(positions)
    ):
        change = torch.zeros(1, group.n_pos, sae.d_in)
        whole = (new_e - e)[b] if feature is None else (new_z - z)[b, :, feature, None] * sae.W_dec[feature]
        change[0, pos] = whole[pos]
        # What enters the MLP reaches the residual stream as well, by way of what attention adds.
        hook = sae.hook.replace("resid_mid", "attn_out")
        with model.edited({hook: lambda value, change=change: value + change.view(value.shape)}):
            logits = model.logits(base[b : b + 1])[0, -1]
        out[b, i, j] = float(logits[group.answer[b]] - logits[group.wrong[b]])
    return out


def seen(model: Model, hook: str, tokens: torch.Tensor) -> torch.Tensor:
    found = []
    with model.edited({hook: lambda value: found.append(value.clone())}):
        model.logits(tokens)
    return found[0].flatten(2)
