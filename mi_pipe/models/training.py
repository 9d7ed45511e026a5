"""Training of small native models: batch of step s from a function of s, AdamW, and a state that can be continued.

Everything that decides the next step is in one checkpoint: weights, both moments, the step, the losses so far.
The learning rate is a function of the step and the batch comes from the step alone, so a run continued from any
checkpoint takes the same steps as one that was never stopped (bit for bit on the CPU with equal threads).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, PositiveFloat, PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mi_pipe.core import atomic
from mi_pipe.core.config import Config
from mi_pipe.core.progress import Progress
from mi_pipe.models.fused import fused_attention


class OptimizerConfig(Config):
    """AdamW (Loshchilov and Hutter 2019) under a linear warm-up and a cosine decay."""

    lr: PositiveFloat = 1e-2
    """Highest learning rate."""
    n_warmup: int = Field(default=100, ge=0)
    """Steps of linear warm-up."""
    final_lr_fraction: float = Field(default=0.1, ge=0, le=1)
    """Learning rate of the last step, as a fraction of the highest."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled weight decay of matrices; biases and norms have none."""
    beta2: float = Field(default=0.98, gt=0, lt=1)
    """Decay of the second moment; the first moment's is 0.9."""
    max_grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this norm."""
    batch_rows: PositiveInt = 32
    """Sequences a step."""

    def lr_at(self, step: int, n_steps: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / (self.n_warmup + 1))
        cosine = 0.5 * (1 + math.cos(math.pi * step / n_steps))
        return self.lr * warm * (self.final_lr_fraction + (1 - self.final_lr_fraction) * cosine)


@dataclass(frozen=True)
class Batch:
    """Sequences of one length, and which of their next tokens can be known."""

    tokens: Int[Tensor, "row pos"]
    predictable: Bool[Tensor, "row target"]
    """Whether `tokens[:, 1:]` follows from what stands before it."""


@dataclass(frozen=True)
class Losses:
    """Mean next-token cross-entropy in nats."""

    all: Float[Tensor, ""]
    predictable: Float[Tensor, ""]


def losses(module: nn.Module, batch: Batch) -> Losses:
    """Return the mean loss over all next tokens, and over the predictable ones."""
    logits = module(batch.tokens)[:, :-1]
    each = nn.functional.cross_entropy(logits.flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none")
    each = each.view(batch.predictable.shape)
    return Losses(each.mean(), each[batch.predictable].mean())


@torch.no_grad()
def accuracy(module: nn.Module, batch: Batch) -> float:
    """Return the share of predictable tokens that have the highest logit."""
    hits = module(batch.tokens)[:, :-1].argmax(-1) == batch.tokens[:, 1:]
    return hits[batch.predictable].float().mean().item()


class Trainer:
    """A model, its optimizer and the loss curve, at some step."""

    def __init__(self, module: nn.Module, optimizer: OptimizerConfig, n_steps: int) -> None:
        """Begin at step 0 with the module's present weights."""
        self.module = module
        self.config = optimizer
        self.n_steps = n_steps
        self.step = 0
        self.curve: list[tuple[float, float]] = []
        self._named = dict(module.named_parameters())
        matrices = [tensor for tensor in self._named.values() if tensor.ndim > 1]
        others = [tensor for tensor in self._named.values() if tensor.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(groups, lr=optimizer.lr, betas=(0.9, optimizer.beta2))

    def advance(self, batch_at: Callable[[int], Batch], until: int, progress: Progress) -> None:
        """Take steps up to step `until`, each on the batch of its number; the loss is over all next tokens."""
        self.module.train()
        with fused_attention(self.module):
            while self.step < until:
                self._take_step(batch_at(self.step))
                progress.update(self.step, self.n_steps, "step", f"loss {self.curve[-1][0]:.3f}")
        self.module.eval()

    def _take_step(self, batch: Batch) -> None:
        found = losses(self.module, batch)
        self._adamw.zero_grad(set_to_none=True)
        found.all.backward()
        nn.utils.clip_grad_norm_(self._named.values(), self.config.max_grad_norm)
        for group in self._adamw.param_groups:
            group["lr"] = self.config.lr_at(self.step, self.n_steps)
        self._adamw.step()
        self.curve.append((found.all.item(), found.predictable.item()))
        self.step += 1

    def save(self, path: Path) -> None:
        """Write everything that decides the next step to one safetensors file, atomically."""
        tensors = {"curve": torch.tensor(self.curve, dtype=torch.float64), "step": torch.tensor(self.step)}
        for name, parameter in self._named.items():
            tensors[f"weights.{name}"] = parameter.detach().cpu().contiguous()
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}.{name}"] = self._adamw.state[parameter][moment].cpu().contiguous()
        with atomic.atomic_path(path) as temp:
            save_file(tensors, temp)

    def restore(self, path: Path) -> None:
        """Continue from a file that `save` wrote."""
        tensors = load_file(path)
        self.step = int(tensors["step"])
        self.curve = [(both[0], both[1]) for both in tensors["curve"].tolist()]
        for name, parameter in self._named.items():
            parameter.data.copy_(tensors[f"weights.{name}"])
            self._adamw.state[parameter] = {
                "step": torch.tensor(float(self.step)),
                "exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device),
            }
