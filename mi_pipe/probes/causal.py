"""Does the model use what a probe reads? Activations are moved along the probe's direction and the model runs on.

At the probe's own rows its hook point's values become x + amount · s · d, with d the unit vector along which the
probe's reading grows fastest and s the deviation of the training rows along d. Noted are the readings of this and of
every later hook point's probe of the same label and position (readings that follow say that the direction is carried
on), and a metric of the model's answer. The same is done along a random direction, with steps of the same length.

The reading of a probe: the logit of class 1 of two, the logit of the first class minus the second's of more (the two
most frequent), or the predicted number; d is its gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mi_pipe.models.hook_points import moved_hook
from mi_pipe.models.model import Model
from mi_pipe.models.reading import Reading, listening

PROBE, RANDOM = "probe", "random"
LastMetric = Callable[[Float[Tensor, "prompt d_vocab"], Int[Tensor, " prompt"]], Float[Tensor, " prompt"]]
"""A metric of last-position logits of some prompts (their numbers)."""
RunOn = Callable[[], Float[Tensor, "prompt d_vocab"]]
"""Runs the model on a batch, from before the hook point that is moved; returns the logits after each prompt."""


@dataclass(frozen=True)
class ReadingDirection:
    """The one number that is followed of a linear probe: x · weight + bias."""

    weight: Float[Tensor, " d"]
    bias: float

    @property
    def unit(self) -> Float[Tensor, " d"]:
        """The direction in which the reading grows."""
        return self.weight / self.weight.norm()

    def read(self, x: Float[Tensor, "row d"]) -> Float[Tensor, " row"]:
        """Return the reading of raw activations, float32."""
        return x.float() @ self.weight + self.bias


def reading_direction(
    weight: Float[Tensor, "output d"], bias: Float[Tensor, " output"], pair: Int[Tensor, " 2"]
) -> ReadingDirection:
    """Return the reading of a linear probe: its one output, or that of class `pair[0]` minus that of `pair[1]`."""
    if len(weight) == 1:
        return ReadingDirection(weight[0], float(bias[0]))
    first, second = pair.tolist()
    return ReadingDirection(weight[first] - weight[second], float(bias[first] - bias[second]))


def random_unit(width: int, seed: int) -> Float[Tensor, " d"]:
    """Return a random unit vector."""
    vector = torch.randn(width, generator=torch.Generator().manual_seed(seed))
    return vector / vector.norm()


@dataclass(frozen=True)
class CausalBatch:
    """Prompts padded at the right, and where probes read them."""

    prompts: Int[np.ndarray, " prompt"]
    tokens: Int[Tensor, "prompt pos"]
    lengths: Int[Tensor, " prompt"]
    is_read: Bool[Tensor, "prompt pos"]


@dataclass(frozen=True)
class CausalRun:
    """What one run gave, prompt by prompt: means over the rows that are read."""

    readings: dict[str, Float[np.ndarray, " prompt"]]
    """By hook point."""
    metric: Float[np.ndarray, " prompt"] | None


@torch.no_grad()
def run_moved(
    model: Model,
    run_on: RunOn,
    batch: CausalBatch,
    hook: str,
    step: Float[Tensor, " d"],
    followed: dict[str, tuple[Reading, ReadingDirection]],
    metric: LastMetric | None,
) -> CausalRun:
    """Run the model with `step` added at `hook` where the batch is read; a step of zeros is the model left alone."""
    is_read = batch.is_read.to(model.device)
    counts = is_read.sum(1)
    found: dict[str, np.ndarray] = {}

    def add(value: Tensor) -> Tensor:
        flat = value.reshape(*is_read.shape, -1)
        moved = flat + is_read[..., None] * step.to(flat)
        return moved.reshape(value.shape)

    def note(name: str, value: Tensor) -> None:
        flat = value.reshape(*is_read.shape, -1)
        readings = followed[name][1].read(flat) * is_read
        found[name] = (readings.sum(1) / counts).cpu().double().numpy()

    readings = {name: reading for name, (reading, _) in followed.items()}
    with model.edited({moved_hook(hook): add}), listening(model.module, readings, note):
        last = run_on()
    if metric is None:
        return CausalRun(found, None)
    values = metric(last.float(), torch.from_numpy(batch.prompts))
    return CausalRun(found, values.cpu().double().numpy())


def make_batch(
    prompts: Int[np.ndarray, " prompt"],
    tokens: list[Int[np.ndarray, " pos"]],
    rows_prompt: Int[np.ndarray, " row"],
    rows_pos: Int[np.ndarray, " row"],
) -> CausalBatch:
    """Return prompts with the positions (`rows_prompt`, `rows_pos`) of a probe's rows marked."""
    ids = [torch.from_numpy(row.astype(np.int64)) for row in tokens]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    is_read = torch.zeros(padded.shape, dtype=torch.bool)
    place = np.searchsorted(prompts, rows_prompt)
    is_read[torch.from_numpy(place), torch.from_numpy(rows_pos.astype(np.int64))] = True
    return CausalBatch(prompts, padded, torch.tensor([len(row) for row in ids]), is_read)
