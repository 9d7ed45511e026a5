"""Activation stores with known values: several hook points of some prompts, made by capturing linear maps."""

import itertools

import numpy as np
import torch

from mi_pipe.activations.harvest.capture import capture
from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.store import Store


class Maps(torch.nn.Module):
    """Applies several matrices to the same rows; each is a hook point `maps.<i>`."""

    def __init__(self, matrices: list[np.ndarray]) -> None:
        super().__init__()
        self.maps = torch.nn.ModuleList(torch.nn.Linear(*matrix.shape, bias=False) for matrix in matrices)
        for layer, matrix in zip(self.maps, matrices, strict=True):
            layer.weight.data = torch.tensor(matrix.T, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [layer(x) for layer in self.maps]


def mapped_store(store: Store, rows: np.ndarray, matrices: list[np.ndarray]) -> ActivationStore:
    """Capture rows under each matrix; every row is a prompt of its own."""
    hooks = [f"maps.{i}" for i in range(len(matrices))]
    return capture(Maps(matrices), rows.astype(np.float32), hooks, store, massive_factor=1e6)


def selections(*widths: int) -> list[np.ndarray]:
    """Matrices that pick consecutive columns."""
    edges = np.cumsum([0, *widths])
    return [np.eye(edges[-1])[:, first:last] for first, last in itertools.pairwise(edges)]
