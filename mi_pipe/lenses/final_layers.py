"""What a model does to the residual stream after its last block: final norm, unembedding, scale and soft cap of logits.

The model's own modules are called, so that the lens at the last depth gives the model's own logits, not an
approximation. A scale or soft cap (Cohere, Granite, Gemma) is no module; it is read from the config, and `check`
compares with the model's own logits, so that an architecture with anything else there is refused and not misread.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mi_pipe.core.errors import ModelError
from mi_pipe.models.logit_map import LogitMap
from mi_pipe.models.model import Model

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
_COARSE = 5e-2
"""Relative to the largest logit; the coarse one is for 16-bit weights."""


class FinalLayers:
    """Decodes residual vectors to logits."""

    def __init__(self, model: Model) -> None:
        """Take the final norm (none where the model has none), the unembedding, and what follows."""
        self._norm = model.final_norm if "ln_final.hook_out" in model.hooks else nn.Identity()
        self._unembedding = model.unembedding
        self._map = LogitMap.of(model.module)
        self.dtype = model.dtype
        self.device = model.device
        self.d_vocab = model.info.d_vocab

    def logits(self, residual: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """Return the logits that the model would give if its last block had left this residual; differentiable."""
        return self._map(self._unembedding(self._norm(residual.to(self.dtype))))

    @torch.no_grad()
    def check(self, last: Float[Tensor, "batch pos d_model"], logits: Float[Tensor, "batch pos d_vocab"]) -> float:
        """Return the largest difference between the lens at the last depth and the model's own logits, relative to
        the largest logit; raises ModelError if they are not the same function.
        """
        try:
            error = float((self.logits(last).float() - logits.float()).abs().max() / logits.float().abs().max())
        except RuntimeError as reason:
            raise ModelError(
                f"Final norm and unembedding of this model do not take its last residual stream ({reason}): something "
                "lies between them that no lens would look through."
            ) from reason
        if not error <= _TOLERANCE.get(self.dtype, _COARSE):
            raise ModelError(
                "Final norm and unembedding of this model do not give its logits from its last residual stream (they "
                f"differ by {error:.2g} of the largest): a lens would show other tokens than the model means."
            )
        return error
