"""What is measured: our training with everything on, and the floor that no step with a dense encoder can go below.

Ours: the shuffled reader on a store, normalisation, the architecture's step, gradient clipping, unit decoder rows,
counters of dead features, moments of the batch and a row of the training curve every 25 steps: `TrainingGroup` as the
stage drives it. A turn is as long as a pool of the reader, so that exactly one is read in each.

Floor: one encoder product (batch, d_in) x (d_in, d_sae) in float32, and a fused Adam step on two such matrices.
"""

from collections.abc import Generator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mi_pipe.activations.harvest.capture import capture
from mi_pipe.activations.store import ActivationStore
from mi_pipe.activations.training.shuffled import ShuffledReader
from mi_pipe.core.store import Store
from mi_pipe.saes.architectures.base import ArchitectureName
from mi_pipe.saes.building import build_trainer
from mi_pipe.saes.config import TrainSAEsConfig
from mi_pipe.saes.kernels import Precision
from mi_pipe.saes.normalisation import Normaliser
from mi_pipe.saes.sites import Sites
from mi_pipe.saes.step import Scratch
from mi_pipe.saes.sweep import SAESpec
from mi_pipe.saes.training import TrainingGroup

HOOK = "0"
_ENDLESS_STEPS = 10**6


@dataclass(frozen=True)
class Sizes:
    """The sizes of a training."""

    d_in: int = 576
    d_sae: int = 4608
    k: int = 32
    batch_rows: int = 4096
    n_steps: int = 16
    """Steps of a turn."""

    @property
    def turn_rows(self) -> int:
        """Rows of a turn."""
        return self.batch_rows * self.n_steps


def store_of(rows: Tensor, root: Store) -> ActivationStore:
    """Return a store that holds `rows` in float16 at the hook point "0"."""
    return capture(nn.Sequential(nn.Identity()), rows, [HOOK], root, store_dtype="float16")


class Training:
    """One or several SAEs in training, some steps a turn."""

    def __init__(
        self,
        store: ActivationStore,
        architectures: list[ArchitectureName],
        sizes: Sizes,
        precision: Precision = "float32",
    ) -> None:
        """Begin; SAEs of the same architecture differ in their seeds."""
        self._n_steps = sizes.n_steps
        config = TrainSAEsConfig(
            n_tokens=_ENDLESS_STEPS * sizes.batch_rows, batch_rows=sizes.batch_rows, device="cpu", d_sae=sizes.d_sae
        )
        sites = Sites.of_sae(HOOK, sizes.d_in)
        specs = [SAESpec(sites, name, sizes.k, sizes.d_sae, seed) for seed, name in enumerate(architectures)]
        scratch = Scratch()
        trainers = {spec.name: build_trainer(config, spec, precision, torch.device("cpu"), scratch) for spec in specs}
        found = store.statistics(HOOK)
        normaliser = Normaliser.from_moments(torch.from_numpy(found.mean), found.mean_square_norm_centred)
        self._group = TrainingGroup(sites, {HOOK: normaliser}, trainers, config.log_steps)
        self._batches = self._read(store, sizes)
        self._n_done = 0

    def turn(self) -> None:
        """Take the steps of a turn."""
        for step in range(self._n_done, self._n_done + self._n_steps):
            self._group.step(next(self._batches), step)
        self._n_done += self._n_steps

    def close(self) -> None:
        """End the reader's threads."""
        self._batches.close()

    @staticmethod
    def _read(store: ActivationStore, sizes: Sizes) -> Generator[dict[str, Tensor]]:
        reader = ShuffledReader(store, [HOOK], sizes.batch_rows, pool_rows=sizes.turn_rows)
        return reader.batches(0, _ENDLESS_STEPS)


class Floor:
    """The product and the optimiser alone."""

    def __init__(self, rows: Tensor, sizes: Sizes) -> None:
        self._rows = rows[: sizes.batch_rows].clone()
        random = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.randn(sizes.d_sae, sizes.d_in, generator=random)) for _ in range(2)]
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=random)
        self._encoder = weights[0].detach()
        self._adam = torch.optim.Adam(weights, lr=1e-4, fused=True)
        self._out = torch.empty(sizes.batch_rows, sizes.d_sae)
        self._n_steps = sizes.n_steps

    def turn(self) -> None:
        """Take the steps of a turn."""
        for _ in range(self._n_steps):
            torch.mm(self._rows, self._encoder.T, out=self._out)
            self._adam.step()
