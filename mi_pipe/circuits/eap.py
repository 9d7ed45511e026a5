"""Edge attribution patching: how much each edge matters, from two forward passes and one backward pass.

The score of an edge from writer u to reader v is the first-order estimate of what happens to the metric m when
v alone receives what u wrote in the corrupted run, the rest being as in the clean run (noising):

    score(u -> v) = sum over positions of (u_corrupted - u_clean) . dm/d(input_v)       (Syed et al. 2023)

with input_v the residual stream *before* v's normalisation. A negative score: the edge supports the clean answer.
EAP-IG-inputs (Hanna et al. 2024) replaces the gradient by its mean over runs that start from the embeddings
e' + alpha (e - e'), e clean and e' corrupted; conventions for alpha with m steps (they differ in print):
"left" k/m for k = 0..m-1, "right" k/m for k = 1..m, "midpoint" (k + 1/2)/m for k = 0..m-1.

Steps, for pairs of one length:
1. record both runs, the clean one with gradients at the outputs of the q, k, v projections and the MLPs' inputs;
2. of each layer, map the gradients back through the projection's weight and the normalisation's Jacobian, which
   gives dm/d(input_v) of every reader;
3. one matrix product of all earlier writers' differences with the layer's readers.
No reader's input is ever materialised in the forward pass. Scores are per pair, so means over pairs do not depend on
the batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mi_pipe.circuits.parts import Parts
from mi_pipe.circuits.recording import Pairs, Recording, check_residual_sum, record, written_difference
from mi_pipe.patching.readout import wide

Convention = Literal["left", "right", "midpoint"]
_OFFSETS: dict[Convention, float] = {"left": 0.0, "right": 1.0, "midpoint": 0.5}
EAP_ALPHAS = (1.0,)


def ig_alphas(n_steps: int, convention: Convention) -> tuple[float, ...]:
    """Return where on the line from corrupted (0) to clean (1) embeddings the gradients are taken.

    >>> ig_alphas(2, "left"), ig_alphas(2, "right"), ig_alphas(2, "midpoint")
    ((0.0, 0.5), (0.5, 1.0), (0.25, 0.75))
    """
    return tuple((k + _OFFSETS[convention]) / n_steps for k in range(n_steps))


@dataclass(frozen=True)
class EdgeScores:
    """Sums over pairs, from which the mean score of each edge and its standard error follow."""

    total: Float[np.ndarray, "writer reader"]
    total_squares: Float[np.ndarray, "writer reader"]
    n_pairs: int

    @classmethod
    def of(cls, scores: Float[Tensor, "pair writer reader"]) -> "EdgeScores":
        """Sum the scores of some pairs."""
        exact = scores.cpu().double()
        return cls(exact.sum(0).numpy(), exact.square().sum(0).numpy(), len(scores))

    @classmethod
    def summed(cls, some: Sequence["EdgeScores"]) -> "EdgeScores":
        """Put together the sums of several batches, in their order."""
        total, squares = some[0].total.copy(), some[0].total_squares.copy()
        for scores in some[1:]:
            total += scores.total
            squares += scores.total_squares
        return cls(total, squares, sum(scores.n_pairs for scores in some))

    @property
    def mean(self) -> Float[np.ndarray, "writer reader"]:
        """Mean score over pairs."""
        return self.total / self.n_pairs

    @property
    def standard_error(self) -> Float[np.ndarray, "writer reader"]:
        """Standard error of the mean (not a number for one pair)."""
        if self.n_pairs == 1:
            return np.full_like(self.total, np.nan)
        variance = (self.total_squares - self.n_pairs * self.mean**2) / (self.n_pairs - 1)
        return np.sqrt(np.maximum(variance, 0) / self.n_pairs)


def score_edges(
    parts: Parts, pairs: Pairs, alphas: Sequence[float] = EAP_ALPHAS
) -> Float[Tensor, "pair writer reader"]:
    """Return the score of every edge for every pair, float32; zero where there is no edge.

    Raises StageError if the model's residual stream is not the sum of what its parts write.
    """
    clean = record(parts, pairs.clean, pairs.answer, pairs.wrong, with_gradients=True)
    corrupted = record(parts, pairs.corrupted, pairs.answer, pairs.wrong)
    written = written_difference(parts, corrupted, clean)
    check_residual_sum(parts, corrupted, clean, written)
    scores = written.new_zeros(len(pairs), parts.graph.n_writers, parts.graph.n_readers)
    for alpha in alphas:
        run = clean
        if alpha != 1.0:
            start = torch.lerp(corrupted.embed, clean.embed.detach(), alpha)
            run = record(parts, pairs.clean, pairs.answer, pairs.wrong, start, with_gradients=True)
        for first_reader, gradients in reader_gradients(parts, run):
            _add_scores(parts, scores, written, first_reader, gradients)
    return scores / len(alphas)


def reader_gradients(parts: Parts, run: Recording) -> Iterator[tuple[int, Float[Tensor, "pair reader pos d_model"]]]:
    """Yield dm/d(input_v), float32, of consecutive readers with the same sources, with the first one's index."""
    graph = parts.graph
    wanted = [*(out for layer in run.projected for out in layer), *run.mlp_normed, run.final_input]
    found = iter(torch.autograd.grad(run.metric.sum(), wanted))
    projected = [[next(found) for _ in layer] for layer in run.projected]
    mlps = [next(found) for _ in run.mlp_normed]
    yield graph.n_readers - 1, wide(next(found).unsqueeze(1))
    for layer, block in enumerate(parts.blocks):
        for projection, gradient in zip(block.projections, projected[layer], strict=True):
            normed = torch.einsum("bsnk,nkm->bnsm", gradient[..., projection.rows], projection.weight())
            reader = graph.first_projection(layer) + projection.first_reader
            yield reader, pull_back(block.attention_norm, run.attention_inputs[layer], normed)
        if block.mlp_norm is not None:
            yield graph.mlp_reader(layer), pull_back(block.mlp_norm, run.mlp_inputs[layer], mlps[layer].unsqueeze(1))


def pull_back(
    norm: nn.Module, value: Float[Tensor, "pair pos d_model"], gradients: Float[Tensor, "pair reader pos d_model"]
) -> Float[Tensor, "pair reader pos d_model"]:
    """Map gradients at a normalisation's output to its input: J^T g with the Jacobian J at `value`, float32."""
    with torch.enable_grad():
        copies = value.detach().unsqueeze(1).repeat(1, gradients.shape[1], 1, 1).requires_grad_()
        return wide(torch.autograd.grad(norm(copies), copies, gradients)[0])


def _add_scores(
    parts: Parts,
    scores: Tensor,
    written: Tensor,
    first_reader: int,
    gradients: Float[Tensor, "pair reader pos d_model"],
) -> None:
    n_sources = int(parts.graph.n_sources[first_reader])
    readers = slice(first_reader, first_reader + gradients.shape[1])
    scores[:, :n_sources, readers] += torch.bmm(written[:, :n_sources].flatten(2), gradients.flatten(2).mT)
