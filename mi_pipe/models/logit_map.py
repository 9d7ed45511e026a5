"""What a model does to its logits after the unembedding: a factor, then a soft cap c tanh(x / c).

It is no module of the model's and is read from the config (Gemma 2, Cohere, Granite, native models). Whoever relies on
it compares with the model's own logits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LogitMap:
    """A factor and a soft cap; a cap of 0 is none."""

    factor: float = 1.0
    cap: float = 0.0

    @classmethod
    def of(cls, module: Any) -> "LogitMap":
        """Read it from a HuggingFace config or a native model's."""
        config: Any = getattr(module, "config", None)
        shape = config.get_text_config() if hasattr(config, "get_text_config") else getattr(module, "cfg", None)
        factor = _number(shape, "logit_scale", 1.0) / _number(shape, "logits_scaling", 1.0)
        cap = _number(shape, "final_logit_softcapping", 0.0) or _number(shape, "output_logits_soft_cap", 0.0)
        return cls(factor, max(cap, 0.0))

    def __call__(self, logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the model's logits from the unembedding's; differentiable."""
        scaled = logits if self.factor == 1.0 else logits * self.factor
        return self.cap * torch.tanh(scaled / self.cap) if self.cap else scaled


def _number(config: Any, name: str, default: float) -> float:
    value = getattr(config, name, None)
    return default if value is None else float(value)
