"""Training of a tuned lens: translators of all depths at once, so that the final distribution is computed once a batch.

Loss of a depth: KL(p ‖ q) averaged over the batch's rows, p the final distribution, q the tuned lens's. Its gradient
by the lens's logits is (q - p) / n, which is put in by hand: no vocabulary-sized value is kept for a backward pass, and
rows are taken in chunks, so memory is a few chunks of `CHUNK_ENTRIES` logits whatever the batch. Adam, learning rate
falling to 0, gradients clipped at norm 1. After each stretch of steps every depth is measured on validation rows, and
the best moment kept, the untrained one (the logit lens) among them.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_pipe.lenses.config import TunedLensConfig
from mi_pipe.lenses.final_layers import FinalLayers
from mi_pipe.lenses.readings import kl_divergence
from mi_pipe.lenses.translators import Translator, TranslatorInTraining
from mi_pipe.lenses.tuning_rows import RowBatch

CHUNK_ENTRIES = 1 << 24
"""Logits (rows times vocabulary) at once: 64 MiB in float32."""
_CLIP = 1.0
_ADAM = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Units:
    """Mean and deviation of a depth's rows."""

    mean: Float[Tensor, " d_model"]
    deviation: Float[Tensor, " d_model"]


class Tuning:
    """Translators in training."""

    def __init__(self, final: FinalLayers, units: dict[int, Units], config: TunedLensConfig) -> None:
        """Begin with translators that change nothing, one a depth in `units`."""
        self._final, self._config = final, config
        self.translators = {
            depth: TranslatorInTraining.identity(unit.mean.to(final.device), unit.deviation.to(final.device))
            for depth, unit in units.items()
        }
        self._adam = {depth: torch.optim.Adam(item.parameters, lr=0.0) for depth, item in self.translators.items()}
        self._best = {
            depth: [part.detach().clone() for part in item.parameters] for depth, item in self.translators.items()
        }
        self.step_no = 0
        self.n_validated = 0
        """How many of the config's checkpoints have been validated."""
        shape = (len(config.checkpoints()), len(units))
        # Mean training KL since the last validation, and KL of each validation; NaN for what is to come.
        self.training_kl = torch.full(shape, torch.nan, dtype=torch.float64)
        self.validation_kl = torch.full(shape, torch.nan, dtype=torch.float64)

    @property
    def depths(self) -> list[int]:
        """The depths, ascending."""
        return list(self.translators)

    def step(self, batch: RowBatch) -> list[float]:
        """Train every depth on one batch; returns its KL before the step by depth."""
        kl = self._pass(batch, with_gradients=True)
        for depth, adam in self._adam.items():
            torch.nn.utils.clip_grad_norm_(self.translators[depth].parameters, _CLIP)
            adam.param_groups[0]["lr"] = self._config.lr * (1 - self.step_no / self._config.n_steps)
            adam.step()
            adam.zero_grad()
        self.step_no += 1
        return [kl[depth] / len(batch.rows) for depth in self.depths]

    def validate(self, batches: list[RowBatch], training: list[float] | None) -> None:
        """Measure every depth, keep it where it is the best so far, and note both figures."""
        place = self._config.checkpoints().index(self.step_no)
        sums = [self._pass(batch, with_gradients=False) for batch in batches]
        n_rows = sum(len(batch.rows) for batch in batches)
        before = self.validation_kl[:place]
        for column, depth in enumerate(self.depths):
            kl = sum(found[depth] for found in sums) / n_rows
            if place == 0 or kl < float(before[:, column].min()):
                self._best[depth] = [part.detach().clone() for part in self.translators[depth].parameters]
            self.validation_kl[place, column] = kl
        self.n_validated = place + 1
        if training is not None:
            self.training_kl[place] = torch.tensor(training, dtype=torch.float64)

    def best(self) -> dict[int, Translator]:
        """Return the translators of the best validation, for raw residual vectors."""
        return {depth: self.translators[depth].folded(*self._best[depth]) for depth in self.depths}

    def _pass(self, batch: RowBatch, with_gradients: bool) -> dict[int, float]:
        """Return the KL summed over the batch by depth; with gradients of its mean left on the translators."""
        size = max(1, CHUNK_ENTRIES // self._final.d_vocab)
        n_rows = len(batch.rows)
        totals = dict.fromkeys(self.depths, 0.0)
        for start in range(0, n_rows, size):
            part = slice(start, start + size)
            with torch.no_grad():
                final = self._final.logits(batch.last[part]).float().log_softmax(-1)
                p = final.exp()
            for depth, translator in self.translators.items():
                with torch.set_grad_enabled(with_gradients):
                    logits = self._final.logits(translator(batch.residuals[depth][part]))
                lens = logits.detach().float().log_softmax(-1)
                totals[depth] += float(kl_divergence(final, lens).sum(dtype=torch.float64))
                if with_gradients:
                    # In place: at this size every further array costs as much as the arithmetic.
                    logits.backward(lens.exp_().sub_(p).div_(n_rows).to(logits.dtype))
        return totals

    def state(self) -> dict[str, Tensor]:
        """Return all that a training goes on from."""
        found: dict[str, Tensor] = {
            "step_no": torch.tensor(self.step_no), "training_kl": self.training_kl, "validation_kl": self.validation_kl,
        }  # fmt: skip
        for depth, item in self.translators.items():
            for i, part in enumerate(item.parameters):
                found |= {f"{depth}.{i}": part.detach(), f"{depth}.{i}.best": self._best[depth][i]}
                moments: dict[str, Any] = self._adam[depth].state.get(part, {})
                found |= {f"{depth}.{i}.{name}": moments[name] for name in _ADAM if name in moments}
        return {name: value.contiguous().cpu() for name, value in found.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from a state that was saved after a validation."""
        self.step_no = int(state["step_no"])
        self.n_validated = 1 + self._config.checkpoints().index(self.step_no)
        self.training_kl, self.validation_kl = state["training_kl"].clone(), state["validation_kl"].clone()
        for depth, item in self.translators.items():
            for i, part in enumerate(item.parameters):
                part.data.copy_(state[f"{depth}.{i}"])
                self._best[depth][i] = state[f"{depth}.{i}.best"].to(part.device)
                if f"{depth}.{i}.step" in state:
                    # Adam's step count stays on the CPU, as Adam itself leaves it.
                    moments = {name: state[f"{depth}.{i}.{name}"].clone() for name in _ADAM}
                    self._adam[depth].state[part] = {
                        name: value if name == "step" else value.to(part.device) for name, value in moments.items()
                    }
