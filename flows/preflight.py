"""What is done before any work begins: recipe read, steps wired, store looked at, hook points checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flows.diagram import Step, diagram, given_of
from flows.forecast import Forecast, check_fit, harvest_forecasts
from flows.given import Given
from flows.patch_checks import check_given, check_planned
from flows.planning import Intent, plan
from flows.reading_checks import check_readings
from flows.recipe import Recipe, load_recipe
from flows.steering_checks import check_planned_steering
from flows.sweep_checks import Reads, check_planned_sweep, check_sweep
from mi_pipe.activations.harvest.hook_selection import select_hooks
from mi_pipe.activations.training.source import widths_of
from mi_pipe.core.store import Store
from mi_pipe.features.scored_saes import scored_saes
from mi_pipe.models.handle import ModelHandle
from mi_pipe.models.hook_points import HookMap
from mi_pipe.models.source import source_hooks
from mi_pipe.models.trained import native_module, wrap_native
from mi_pipe.opening import open_artifact
from stages import score_features, train_saes

_LOOKS_AT_HOOKS = ("harvest", "train_saes", "steer")


@dataclass(frozen=True)
class Prepared:
    """A recipe that is known to be sound, and what each of its steps would do."""

    recipe: Recipe
    store: Store
    steps: list[Step]
    intents: list[Intent]
    given: tuple[Given, ...] = ()
    """What the steps read that is there already and none of them makes."""
    hooks: HookMap | None = None
    """The model's hook points, where a step looks at them."""
    forecasts: tuple[Forecast, ...] = ()
    """What each harvest that is not done will take."""


def prepare(recipe: str | Mapping[str, Any], overrides: Sequence[str], store: str | None) -> Prepared:
    """Read and check everything that can be known early.

    Raises ConfigError, ModelError, HookPointError, DiskSpaceError or ArtifactDamagedError, each before any work.
    """
    content = load_recipe(recipe, overrides)
    where = Store(store or content.store)
    steps = diagram(content, where)
    intents = plan(steps, where)
    given = tuple(given_of(steps))
    check_readings(content, intents, where)
    check_given(content, given)
    reads = _reads_of_saes(intents, where)
    if reads.saes is not None and reads.activations is not None:
        scored_saes(reads.saes, widths_of(reads.activations), reads.activations.id)
    if not any(intent.action != "cached" and intent.step.stage.name in _LOOKS_AT_HOOKS for intent in intents):
        return Prepared(content, where, steps, intents, given)
    hooks = _hooks(content, steps)
    _check_hooks(content, reads, hooks)
    if content.steering is not None and hooks is not None:
        check_planned_steering(content.steering, hooks, _handle(steps))
    forecasts = [] if hooks is None else harvest_forecasts(intents, hooks, where)
    for forecast in forecasts:
        check_fit(forecast)
    return Prepared(content, where, steps, intents, given, hooks, tuple(forecasts))


def _check_hooks(recipe: Recipe, reads: Reads, hooks: HookMap | None) -> None:
    """Raise HookPointError or ConfigError for what would fail only after hours."""
    if recipe.saes and reads.activations is not None:
        check_planned(recipe, check_sweep(recipe.saes, reads, hooks))
    if recipe.harvest is None or hooks is None:
        return
    harvested = {site.name: site.width for site in select_hooks(recipe.harvest.hooks, hooks)}
    if recipe.saes and reads.activations is None:
        check_planned(recipe, check_planned_sweep(recipe.saes, harvested, reads.other))
    if reads.saes is not None and reads.activations is None:
        scored_saes(reads.saes, harvested, "harvest.hooks")


def _reads_of_saes(intents: list[Intent], store: Store) -> Reads:
    """Return what the recipe's SAEs read; a harvest counts as there if it will not be made anew."""
    found: dict[str, Any] = {"activations": None}
    steps = [intent.step for intent in intents if intent.step.stage in (train_saes.STAGE, score_features.STAGE)]
    for role, source in steps[0].sources() if steps else ():
        if role not in ("activations", "other", "start", "saes"):
            continue
        if not isinstance(source, Step):
            found[role] = source
        elif any(intent.step is source and intent.action == "cached" for intent in intents):
            found[role] = open_artifact(store.folder(source.id))
    return Reads(**found)


def _hooks(recipe: Recipe, steps: list[Step]) -> HookMap | None:
    """Return the hook points of the recipe's model, or None without one."""
    if recipe.train_model:
        return wrap_native(native_module(recipe.train_model.model.native_fields(recipe.train_model.seed))).hooks
    handle = _handle(steps)
    return None if handle is None else source_hooks(handle)[0]


def _handle(steps: list[Step]) -> ModelHandle | None:
    """Return the recipe's model, or None if there is none, or it is still to be trained."""
    handles = (source for step in steps for _, source in step.sources() if isinstance(source, ModelHandle))
    return next(handles, None)
