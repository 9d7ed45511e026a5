"""Greedy coordinate gradient: single tokens of inputs are exchanged, as long as that raises an objective.

The effect of putting token v at position p is, to first order, (e_v - e_p) · ∂m/∂e_p (HotFlip, Ebrahimi et al. 2018).
A round looks at the `n_top` tokens of largest effect at each position, runs `n_candidates` of these exchanges, half of
them those of largest effect (as HotFlip does) and half a random choice (as GCG does, Zou et al. 2023), and takes the
best if it is better. One gradient and `n_candidates` forwards a round and input. Either half alone finds less at the
same number of forwards (docs/maximisation.md). What is found is text that the model can be given, and no worse than its
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
        effects, top = self._first_order(tokens).topk(self._n_top, dim=2)
        which = self._chosen(effects.flatten(1))
        candidates = tokens[:, None].repeat(1, which.shape[1], 1)
        return candidates.scatter_(2, (which // self._n_top)[..., None], top.flatten(1).gather(1, which)[..., None])

    def _chosen(self, effects: Float[Tensor, "input exchange"]) -> Int[Tensor, "input candidate"]:
        """Return numbers of exchanges: all if so many are to be run, else the best ones and a random choice."""
        n_inputs, n_all = effects.shape
        if n_all <= self._n_candidates:
            return torch.arange(n_all, device=effects.device).expand(n_inputs, -1)
        n_drawn = self._n_candidates // 2
        best = effects.topk(self._n_candidates - n_drawn).indices
        drawn = [torch.randperm(n_all, generator=self._generator)[:n_drawn] for _ in range(n_inputs)]
        return torch.cat([best, torch.stack(drawn).to(best.device)], dim=1)

    def _first_order(self, tokens: Int[Tensor, "input pos"]) -> Float[Tensor, "input pos d_vocab"]:
        embedded = self._table[tokens].requires_grad_()
        (gradient,) = torch.autograd.grad(self._objective.of_embeddings(embedded).sum(), embedded)
        effect = gradient @ self._table.T - (gradient * embedded.detach()).sum(-1, keepdim=True)
        return effect.masked_fill(~self._usable, -torch.inf).scatter(2, tokens[..., None], -torch.inf)
