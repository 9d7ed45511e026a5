"""A running average of the weights, which is what is saved where it is asked for.

avg ← d_t avg + (1 - d_t) w after each step, d_t = min(decay, (1 + t) / (10 + t)), so that the random start is forgotten
early. Decoder rows of the average are brought back to norm 1 where the architecture holds them there.
"""

from torch import Tensor

from mi_pipe.saes.parameters import Parameters, unit_rows_


class WeightAverage:
    """The average of one SAE's parameters."""

    def __init__(self, params: Parameters, decay: float) -> None:
        """Begin at the parameters as they are."""
        self._average = params.copy()
        self._decay = decay

    def update(self, params: Parameters, step: int) -> None:
        """Add the parameters after a step, counted from 0."""
        decay = min(self._decay, (1 + step) / (10 + step))
        for mine, value in zip(self._average.named().values(), params.named().values(), strict=True):
            mine.lerp_(value, 1 - decay)

    def parameters(self, has_unit_decoder: bool) -> Parameters:
        """Return the averaged parameters."""
        average = self._average.copy()
        if has_unit_decoder:
            unit_rows_(average.W_dec)
        return average

    def state(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold."""
        return self._average.named()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a checkpoint's state."""
        for name, value in self._average.named().items():
            value.copy_(state[name])
