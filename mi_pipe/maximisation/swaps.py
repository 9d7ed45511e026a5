"""Greedy coordinate gradient: single tokens of inputs are exchanged, as long as that raises an objective.

The effect of putting token v at position p is, to first order, (e_v - e_p) · ∂m/∂e_p (HotFlip, Ebrahimi et al. 2018).
A round draws `n_candidates` exchanges, each at a random position with one of the `n_top` tokens of largest effect
there, runs them all, and takes the best if it is better (GCG, Zou et al. 2023, who take it in any case). One gradient
and `n_candidates` forwards a round and input. What is found is text that the model can be given, and no worse than its
beginning; it is the best input only where all exchanges were run.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_pipe.maximisation.running import Objective

_BATCH_INPUTS = 256


class Swaps:
    """Exchanges of single tokens, round by round."""

    def __init__(
        self,
        objective: Objective,
        table: Float[Tensor, "d_vocab d_model"],
        usable: Bool[Tensor, " d_vocab"],
        n_candidates: int,
        n_top: int,
        seed: int,
    ) -> None:
        """Exchange `usable` tokens, whose embeddings are `table`."""
        self._objective, self._table, self._usable = objective, table, usable.to(table.device)
        self._n_candidates, self._n_top = n_candidates, max(1, min(n_top, int(usable.sum()) - 1))
        self._generator = torch.Generator().manual_seed(seed)

    def improved(self, tokens: Int[Tensor, "input pos"], n_rounds: int) -> Int[Tensor, "input pos"]:
        """Return inputs whose objective is nowhere below that of `tokens`."""
        tokens = tokens.clone()
        values = self._objective.of_tokens(tokens).detach()
        for _ in range(n_rounds):
            candidates = self._candidates(tokens)
            with torch.no_grad():
                parts = [self._objective.of_tokens(some) for some in candidates.flatten(0, 1).split(_BATCH_INPUTS)]
            best, which = torch.cat(parts).view(len(tokens), -1).max(1)
            better = best > values
            tokens[better] = candidates[better, which[better]]
            values = torch.where(better, best, values)
        return tokens

    def _candidates(self, tokens: Int[Tensor, "input pos"]) -> Int[Tensor, "input candidate pos"]:
        """Return inputs with one token exchanged."""
        top = self._first_order(tokens).topk(self._n_top, dim=2).indices
        n_inputs, n_pos = tokens.shape
        n_all = n_pos * self._n_top
        drawn = [torch.randperm(n_all, generator=self._generator)[: self._n_candidates] for _ in range(n_inputs)]
        which = torch.stack(drawn).to(tokens.device)
        candidates = tokens[:, None].repeat(1, which.shape[1], 1)
        return candidates.scatter_(2, (which // self._n_top)[..., None], top.flatten(1).gather(1, which)[..., None])

    def _first_order(self, tokens: Int[Tensor, "input pos"]) -> Float[Tensor, "input pos d_vocab"]:
        embedded = self._table[tokens].requires_grad_()
        (gradient,) = torch.autograd.grad(self._objective.of_embeddings(embedded).sum(), embedded)
        effect = gradient @ self._table.T
        return effect.masked_fill(~self._usable, -torch.inf).scatter(2, tokens[..., None], -torch.inf)
