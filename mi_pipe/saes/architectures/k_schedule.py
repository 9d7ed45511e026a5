"""How many features a row may have, by step: constant, or falling to k over a first share of the training."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KSchedule:
    """k by step.

    >>> [KSchedule(8, 32, 0.5).at(step, 100) for step in (0, 25, 50, 99)]
    [32, 20, 8, 8]
    """

    k: int
    start: int | None = None
    """k at the first step; None for no annealing."""
    fraction: float = 0.0
    """Share of the training over which k falls linearly."""

    def at(self, step: int, n_steps: int) -> int:
        """Return k at a step counted from 0."""
        n_falling = self.fraction * n_steps
        if self.start is None or step >= n_falling:
            return self.k
        return round(self.start + (self.k - self.start) * step / n_falling)
