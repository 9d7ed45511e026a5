"""What a harvest will take before it is begun: rows, bytes of each hook point, hours on this machine, free space.

Rows are exact if the prompts exist, else what their config asks for. Speed comes from a few seconds of the harvest's
own forward pass, where the model is there. What cannot fit is refused with what would make it fit.
"""

from dataclasses import dataclass
from typing import Any

from flows.diagram import Step
from flows.planning import Intent
from mi_pipe.activations.harvest.batches import batch_tokens_for
from mi_pipe.activations.harvest.forward import load_pass
from mi_pipe.activations.harvest.hook_selection import select_hooks
from mi_pipe.activations.harvest.probe import tokens_per_s
from mi_pipe.activations.storage_dtype import numpy_dtype
from mi_pipe.core.artifact import format_size
from mi_pipe.core.errors import DiskSpaceError
from mi_pipe.core.stage import DISK_MARGIN, free_bytes
from mi_pipe.core.store import Store
from mi_pipe.models.device import pick_device
from mi_pipe.models.hook_points import HookMap
from mi_pipe.prompts.config import PromptConfig
from mi_pipe.prompts.prompt_set import PromptSet
from stages.harvest_plan import HarvestConfig, precision_of

_TYPICAL_LENGTH = 128
_LARGEST_STRIDE = 64
"""Keeping every n-th token is offered up to here; beyond, fewer prompts serve better."""


@dataclass(frozen=True)
class Forecast:
    """What one harvest will take."""

    step: Step
    n_tokens: int
    """Tokens to run; rows are at most as many."""
    is_exact: bool
    """True if the prompts exist."""
    row_bytes: dict[str, int]
    """Bytes of a row by hook point."""
    n_stored_bytes: int
    """Bytes that an earlier launch has written."""
    free_bytes: int | None
    """Free space where the shards go; None for an object store."""
    place: str

    @property
    def label(self) -> str:
        """Name of the step."""
        return self.step.label

    @property
    def size_bytes(self) -> int:
        """Bytes of all rows of all hook points."""
        return self.n_tokens * sum(self.row_bytes.values())

    def lines(self, speed: float | None) -> list[str]:
        """Return the forecast in words; `speed` is in tokens a second."""
        about = "" if self.is_exact else "about "
        found = [f"{self.label}: {about}{self.n_tokens:,} tokens, {format_size(self.size_bytes)} in {self.place}"]
        found += [f"  {hook}  {format_size(self.n_tokens * size)}" for hook, size in self.row_bytes.items()]
        if self.free_bytes is not None:
            found.append(f"  {format_size(self.free_bytes)} are free")
        if speed:
            seconds = self.n_tokens / speed
            hours = f"{seconds / 3600:.1f} hours" if seconds > 3600 else f"{seconds / 60:.1f} minutes"  # noqa: PLR2004
            found.append(f"  {hours} at {speed:,.0f} tokens a second on this machine")
        return found


def harvest_forecasts(intents: list[Intent], hooks: HookMap, store: Store) -> list[Forecast]:
    """Return a forecast of each harvest that is not done."""
    return [
        _forecast(intent.step, hooks, store)
        for intent in intents
        if intent.step.stage.name == "harvest" and intent.action != "cached"
    ]


def check_fit(forecast: Forecast) -> None:
    """Raise DiskSpaceError, with ways to make it fit, if a harvest cannot be stored."""
    if forecast.free_bytes is None:
        return
    needed = int(forecast.size_bytes * DISK_MARGIN) - forecast.n_stored_bytes
    if needed <= forecast.free_bytes:
        return
    ways = ", or with ".join(_ways_to_shrink(forecast, forecast.free_bytes))
    raise DiskSpaceError(
        f"{forecast.label} needs {format_size(needed)} in {forecast.place} and {format_size(forecast.free_bytes)} are "
        f"free. It fits with {ways}; or write to an object store (harvest.destination=s3://bucket/prefix) or another "
        "disk (--store)."
    )


def _ways_to_shrink(forecast: Forecast, free_bytes: int) -> list[str]:
    """Return what would make a harvest fit, by the recipe's keys."""
    usable = (free_bytes + forecast.n_stored_bytes) / DISK_MARGIN
    ways = [f"{int(usable / sum(forecast.row_bytes.values())):,} tokens (prompts.n_tokens)"]
    n_hooks, n_left = len(forecast.row_bytes), int(usable / forecast.size_bytes * len(forecast.row_bytes))
    if n_left:
        ways.append(f"{n_left} of the {n_hooks} hook points (harvest.hooks)")
    every = -(-forecast.size_bytes // max(1, int(usable)))
    if every <= _LARGEST_STRIDE:
        ways.append(f"one token in {every} (harvest.positions='every {every}')")
    return ways


def measured_speed(forecast: Forecast, hooks: HookMap, store: Store) -> float | None:
    """Return tokens a second of a harvest on this machine, or None where its model is not there yet."""
    config: Any = forecast.step.config
    source: Any = forecast.step.inputs["model"]
    if isinstance(source, Step):
        if not store.is_published(source.id):
            return None
        from mi_pipe.opening import open_artifact

        source = open_artifact(store.folder(source.id))
    names = [site.name for site in select_hooks(config.hooks, hooks)]
    forward = load_pass(source, names, precision_of(config), config.store_dtype, config.device)
    length = min(_length(forecast.step, store), forward.info.n_ctx)
    batch_tokens = config.batch_tokens or batch_tokens_for(pick_device(config.device))
    return tokens_per_s(forward, forward.info.d_vocab, length, batch_tokens)


def _forecast(step: Step, hooks: HookMap, store: Store) -> Forecast:
    config: Any = step.config
    assert isinstance(config, HarvestConfig), "a step of the stage harvest"
    itemsize = numpy_dtype(config.store_dtype).itemsize
    sites = select_hooks(config.hooks, hooks)
    n_tokens, is_exact = _n_tokens(step, store)
    written = store.folder(step.id)
    stored = sum(path.stat().st_size for path in written.rglob("*") if path.is_file()) if written.exists() else 0
    remote = config.destination
    return Forecast(
        step=step,
        n_tokens=n_tokens,
        is_exact=is_exact,
        row_bytes={site.name: site.width * itemsize for site in sites},
        n_stored_bytes=0 if remote else stored,
        free_bytes=None if remote else free_bytes(store.root),
        place=remote or str(store.root),
    )


def _prompts(step: Step, store: Store) -> PromptSet | PromptConfig:
    source: Any = step.inputs["prompts"]
    if store.is_published(source.id):
        return PromptSet(store.folder(source.id))
    return source.config


def _n_tokens(step: Step, store: Store) -> tuple[int, bool]:
    prompts = _prompts(step, store)
    if isinstance(prompts, PromptSet):
        return prompts.n_tokens, True
    return prompts.n_tokens_expected, False


def _length(step: Step, store: Store) -> int:
    prompts = _prompts(step, store)
    if isinstance(prompts, PromptSet):
        return max(1, prompts.n_tokens // prompts.n_prompts)
    return getattr(prompts, "window", _TYPICAL_LENGTH)
