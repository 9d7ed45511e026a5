"""Ways to do the same take turns in rounds, and are compared round by round, the quietest rounds counted."""

import statistics
from collections.abc import Callable
from typing import Any

from bench.clock import Turn, timed

Ways = dict[str, Callable[[], tuple[float, float] | None]]
_LARGEST_SHARE_REPEATED = 2


def in_turn(ways: Ways, n_rounds: int) -> dict[str, list[Turn]]:
    """Give each way its turn once a round, after one round that is not counted; the quietest rounds are kept."""
    rounds: list[dict[str, Turn]] = []
    n_quiet = 0
    for i in range(1 + _LARGEST_SHARE_REPEATED * n_rounds):
        turns = {name: timed(way) for name, way in ways.items()}
        if i:
            rounds.append(turns)
            n_quiet += all(turn.is_quiet for turn in turns.values())
        if n_quiet == n_rounds:
            break
    rounds.sort(key=lambda turns: max(turn.foreign_cores or 0.0 for turn in turns.values()))
    return {name: [turns[name] for turns in rounds[:n_rounds]] for name in ways}


def speed_ratio(name: str, ours: list[Turn], others: list[Turn], factor: float = 1.0) -> dict[str, Any]:
    """Return how many times as fast ours is, times `factor`."""
    wall = [factor * other.wall / mine.wall for mine, other in zip(ours, others, strict=True)]
    cpu = [factor * other.cpu / mine.cpu for mine, other in zip(ours, others, strict=True)]
    rounds = [round(value, 3) for value in wall]
    return {name: round(statistics.median(wall), 3), "cpu": round(statistics.median(cpu), 3), "rounds": rounds}
