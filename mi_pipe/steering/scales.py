"""Steps that are measured on text instead of following from the direction: the norm of activations, a feature's reach.

Both on all tokens of some prompts but BOS and those of massive norm.
"""

from collections.abc import Sequence

import torch

from mi_pipe.core.errors import ConfigError
from mi_pipe.models.model import Model
from mi_pipe.saes.sae import SAE
from mi_pipe.steering.batches import BATCH_TOKENS, Tokens
from mi_pipe.steering.contrast import usual_activations
from mi_pipe.steering.direction import Direction

_ENCODED_ROWS = 256


def norm_scaled(
    model: Model, direction: Direction, prompts: Sequence[Tokens], batch_tokens: int = BATCH_TOKENS
) -> Direction:
    """Return the direction with steps as long as the activations at its hook point are on average."""
    rows = usual_activations(model, [direction.hook], prompts, batch_tokens)
    return direction.with_scale(float(rows.double().norm(dim=1).mean()))


def reach_scaled(
    model: Model,
    direction: Direction,
    sae: SAE,
    feature: int,
    prompts: Sequence[Tokens],
    batch_tokens: int = BATCH_TOKENS,
) -> Direction:
    """Return a feature's direction with steps of its largest activation on the prompts, times its decoder row's norm.

    Coefficients are then multiples of that activation (as in Templeton et al. 2024 and AxBench, Wu et al. 2025). Raises
    ConfigError if the feature does not fire.
    """
    rows = usual_activations(model, list(sae.sites.inputs), prompts, batch_tokens)
    with torch.no_grad():
        largest = max(float(sae.encode(some)[:, feature].max()) for some in rows.split(_ENCODED_ROWS))
    if largest <= 0:
        raise ConfigError(
            f"Feature {feature} of {sae.name} fires nowhere in the {len(prompts)} prompts that its activations are "
            "measured on: give more or other prompts, or a scale of your own."
        )
    return direction.with_scale(largest * direction.scale)
