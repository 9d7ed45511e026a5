"""Running a circuit: every edge outside it carries what it carried in the corrupted run.

The input of reader v is, in topological order,

    input_v(corrupted) + sum over u in the circuit's edges into v of (u_now - u_corrupted)

which is the same as correcting the present input by (u_corrupted - u_now) over the edges outside, and is exact for
the empty circuit and cheap for small ones. It is done with hooks on the plain model: each q, k, v projection's
output is replaced, head by head, by that of the head's own normalised input; each MLP's and the logits' input likewise.
The residual stream that the model carries along is read by nobody.

Normalised faithfulness (Miller et al. 2024; MIB 2025): f(C) = (m(C) - m(empty)) / (m(M) - m(empty)), each m a mean over
pairs; m(empty) is the corrupted run and m(M) the clean run.
"""

from contextlib import ExitStack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mi_pipe.circuits.parts import Parts, Projection
from mi_pipe.circuits.prune import EdgeMask
from mi_pipe.circuits.recording import Pairs, record, run_metric, written_by_heads
from mi_pipe.models.model import Edit
from mi_pipe.patching.metrics import recovered_fraction
from mi_pipe.patching.readout import wide

INTERVAL = (2.5, 97.5)


@torch.no_grad()
def base_metrics(parts: Parts, pairs: Pairs) -> tuple[Float[Tensor, " pair"], Float[Tensor, " pair"]]:
    """Return the metric of the clean run (that of the full circuit) and of the corrupted run (of the empty one)."""
    clean, corrupted = (
        run_metric(parts, tokens, pairs.answer, pairs.wrong, {}) for tokens in (pairs.clean, pairs.corrupted)
    )
    return clean, corrupted


class CircuitRunner:
    """Runs circuits on the same pairs of one length; the corrupted run is recorded once."""

    def __init__(self, parts: Parts, pairs: Pairs) -> None:
        """Record the corrupted run."""
        self.parts = parts
        self.pairs = pairs
        self.base = record(parts, pairs.corrupted, pairs.answer, pairs.wrong)

    @torch.no_grad()
    def metric(self, mask: EdgeMask) -> Float[Tensor, " pair"]:
        """Return the metric of each pair when only the edges of `mask` carry the clean run."""
        if not mask.any():
            return self.base.metric
        run = _CircuitRun(self, mask)
        with ExitStack() as stack:
            for layer, block in enumerate(self.parts.blocks):
                for i, projection in enumerate(block.projections):
                    hook = run.projection_hook(layer, i, projection)
                    stack.callback(projection.module.register_forward_hook(hook).remove)
            return run_metric(self.parts, self.pairs.clean, self.pairs.answer, self.pairs.wrong, run.edits())


class _CircuitRun:
    """One forward pass: collects what the circuit's writers write and gives each reader its input."""

    def __init__(self, runner: CircuitRunner, mask: EdgeMask) -> None:
        self.parts, self.base, self.graph = runner.parts, runner.base, runner.parts.graph
        embed = wide(self.base.embed)
        self.writers = np.flatnonzero(mask.any(axis=1))
        self.slots = {int(writer): slot for slot, writer in enumerate(self.writers)}
        self.mask = torch.from_numpy(mask[self.writers]).to(embed)
        self.is_read = np.asarray(mask.any(axis=0))
        self.written = embed.new_zeros(len(embed), len(self.writers), *embed.shape[1:])
        """What each of the circuit's writers now writes, less what it wrote in the corrupted run."""

    def edits(self) -> dict[str, Edit]:
        """Return what is to be done at the hook points of the plain model."""
        edits: dict[str, Edit] = {"blocks.0.hook_resid_pre": self._enter, "ln_final.hook_in": self._leave}
        for layer, block in enumerate(self.parts.blocks):
            edits[f"blocks.{layer}.attn.o.hook_in"] = lambda z, layer=layer: self._heads(layer, z)
            if block.mlp_norm is not None:
                norm = block.mlp_norm
                edits[f"blocks.{layer}.mlp.hook_in"] = lambda _, layer=layer, norm=norm: self._mlp_input(layer, norm)
                edits[f"blocks.{layer}.mlp.hook_out"] = lambda value, layer=layer: self._mlp(layer, value)
        return edits

    def projection_hook(self, layer: int, i: int, projection: Projection):
        """Return a forward hook that gives each head the q, k or v of its own input."""
        norm, first = self.parts.blocks[layer].attention_norm, self.graph.first_projection(layer)
        start = first + projection.first_reader
        readers = start + np.flatnonzero(self.is_read[start : start + projection.n_readers])

        def hook(_module: nn.Module, _args: tuple[Tensor, ...], _output: Tensor) -> Tensor:
            output = self.base.projected[layer][i]
            if not len(readers):
                return output
            output = output.clone()
            normed = norm(self._inputs(readers, self.base.attention_inputs[layer]))
            for j, reader in enumerate(readers):
                output[..., projection.rows[reader - start]] = projection.of_reader(int(reader - start), normed[:, j])
            return output

        return hook

    def _inputs(self, readers: np.ndarray, base: Tensor) -> Float[Tensor, "pair reader pos d_model"]:
        """Return the inputs, before normalisation, of readers that see the same writers."""
        n_slots = int(np.searchsorted(self.writers, self.graph.n_sources[readers[0]]))
        change = self.mask[:n_slots, readers].T @ self.written[:, :n_slots].flatten(2)
        return (wide(base).unsqueeze(1) + change.unflatten(2, base.shape[1:])).to(base.dtype)

    def _input(self, reader: int, base: Tensor) -> Float[Tensor, "pair pos d_model"]:
        return self._inputs(np.array([reader]), base)[:, 0] if self.is_read[reader] else base

    def _enter(self, value: Tensor) -> None:
        if 0 in self.slots:
            self.written[:, 0] = wide(value) - wide(self.base.embed)

    def _heads(self, layer: int, value: Tensor) -> None:
        first = self.graph.first_head(layer)
        start, stop = np.searchsorted(self.writers, [first, first + self.graph.n_heads])
        if start == stop:
            return
        heads = torch.from_numpy(self.writers[start:stop] - first)
        z = value.unflatten(-1, (self.graph.n_heads, -1))[:, :, heads]
        change = wide(z) - wide(self.base.heads[layer][:, :, heads])
        self.written[:, start:stop] = written_by_heads(self.parts.blocks[layer], change, heads)

    def _mlp_input(self, layer: int, norm: nn.Module) -> Tensor:
        return norm(self._input(self.graph.mlp_reader(layer), self.base.mlp_inputs[layer]))

    def _mlp(self, layer: int, value: Tensor) -> None:
        slot = self.slots.get(self.graph.mlp_writer(layer))
        if slot is not None:
            self.written[:, slot] = wide(value) - wide(self.base.mlps[layer])

    def _leave(self, _value: Tensor) -> Tensor:
        return self._input(self.graph.n_readers - 1, self.base.final_input)


def normalised_faithfulness(
    metric: Float[np.ndarray, " pair"], clean: Float[np.ndarray, " pair"], corrupted: Float[np.ndarray, " pair"]
) -> float:
    """Return (mean m(C) - mean m(empty)) / (mean m(M) - mean m(empty)): a ratio of means over pairs.

    >>> normalised_faithfulness(np.array([1.0, 2.0]), np.array([2.0, 4.0]), np.array([0.0, 0.0]))
    0.5
    """
    return float(recovered_fraction(metric.mean(), clean.mean(), corrupted.mean())) + 0.0  # no negative zero


def bootstrap_interval(
    metric: Float[np.ndarray, " pair"],
    clean: Float[np.ndarray, " pair"],
    corrupted: Float[np.ndarray, " pair"],
    n_resamples: int,
    seed: int,
) -> tuple[float, float]:
    """Return the 95% percentile interval of the normalised faithfulness over resampled pairs."""
    pairs = np.random.default_rng(seed).integers(len(metric), size=(n_resamples, len(metric)))
    values = recovered_fraction(metric[pairs].mean(1), clean[pairs].mean(1), corrupted[pairs].mean(1))
    low, high = np.nanpercentile(values, INTERVAL)
    return float(low), float(high)
