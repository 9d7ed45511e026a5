"""A store of activations in which directions are planted, made by capturing them."""

import numpy as np
import pandas as pd
import torch

from mi_pipe.activations.harvest.capture import capture
from mi_pipe.activations.store import ActivationStore
from mi_pipe.core.store import Store

WIDTH = 24


def planted_rows(n: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rows, the unit direction along which a class is written, and the classes."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=WIDTH)
    direction /= np.linalg.norm(direction)
    classes = rng.integers(0, 2, n)
    rows = rng.normal(size=(n, WIDTH)) + 4 * np.outer(classes - 0.5, direction)
    return rows.astype(np.float32), direction, classes


def planted_store(store: Store, folder, n: int = 600) -> tuple[ActivationStore, np.ndarray]:
    """Return a captured store and the direction; `folder`/labels.parquet has the classes by row."""
    rows, direction, classes = planted_rows(n)
    captured = capture(torch.nn.Sequential(torch.nn.Identity()), rows, ["0"], store)
    words = np.array(["no", "yes"])[classes]
    pd.DataFrame({"row": np.arange(n), "label": words}).to_parquet(folder / "labels.parquet")
    return ActivationStore(captured.path), direction


def parity_of_row(rows: pd.DataFrame) -> np.ndarray:
    """A label by import path."""
    return rows["row"].to_numpy() % 2 == 0
