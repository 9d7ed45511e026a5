"""Single-token exchanges that raise an objective: the first-order best ones are run, and the best is taken if better.

The effect of putting token v at position p is, to first order, (e_v - e_p) · ∂m/∂e_p (HotFlip, Ebrahimi et al. 2018);
GCG (Zou et al. 2023) runs the best of these too. One gradient and `n_candidates` forwards a round and input; inputs on
which no exchange helps are done.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_pipe.maximisation.running import Objective

_BATCH_INPUTS = 256


def improve_by_swaps(
    objective: Objective,
    tokens: Int[Tensor, "input pos"],
    table: Float[Tensor, "d_vocab d_model"],
    usable: Bool[Tensor, " d_vocab"],
    n_rounds: int,
    n_candidates: int,
) -> Int[Tensor, "input pos"]:
    """Return inputs whose objective is nowhere below that of `tokens`."""
    tokens = tokens.clone()
    values = objective.of_tokens(tokens).detach()
    for _ in range(n_rounds):
        candidates = _candidates(objective, tokens, table, usable, n_candidates)
        flat = candidates.flatten(0, 1)
        with torch.no_grad():
            found = torch.cat(
                [objective.of_tokens(flat[i : i + _BATCH_INPUTS]) for i in range(0, len(flat), _BATCH_INPUTS)]
            )
        best, which = found.view(len(tokens), -1).max(1)
        better = best > values
        if not better.any():
            break
        tokens[better] = candidates[better, which[better]]
        values = torch.where(better, best, values)
    return tokens


def _candidates(
    objective: Objective,
    tokens: Int[Tensor, "input pos"],
    table: Float[Tensor, "d_vocab d_model"],
    usable: Bool[Tensor, " d_vocab"],
    n_candidates: int,
) -> Int[Tensor, "input candidate pos"]:
    """Return inputs with one token exchanged, those with the largest first-order effect."""
    embedded = table[tokens].requires_grad_()
    (gradient,) = torch.autograd.grad(objective.of_embeddings(embedded).sum(), embedded)
    effect = gradient @ table.T - (gradient * embedded.detach()).sum(-1, keepdim=True)
    effect = effect.masked_fill(~usable.to(effect.device), -torch.inf)
    effect.scatter_(2, tokens[..., None], -torch.inf)
    n_tokens = table.shape[0]
    top = effect.flatten(1).topk(min(n_candidates, effect[0].numel())).indices
    candidates = tokens[:, None].repeat(1, top.shape[1], 1)
    return candidates.scatter_(2, (top // n_tokens)[..., None], (top % n_tokens)[..., None])
