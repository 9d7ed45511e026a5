"""What of a recipe's lenses, probes and steering can be known to fail before any work.

Where all that a step reads is there, its own estimate is asked, which looks at labels, conditions, hook points and
prompts. Where the harvest is still to be made, hook points are compared with those it will store.
"""

import re

from flows.diagram import Step
from flows.planning import Intent
from flows.recipe import Recipe
from mi_pipe.core.errors import HookPointError, near_names
from mi_pipe.core.store import Store
from mi_pipe.lenses.depths import depth_of
from mi_pipe.opening import open_artifact
from stages import lenses, probes, steer

_STAGES = (lenses.STAGE, probes.STAGE, steer.STAGE)


def check_readings(recipe: Recipe, intents: list[Intent], store: Store) -> None:
    """Raise ConfigError, HookPointError or PromptError for lenses and probes that would fail when their turn comes."""
    is_there = {id(intent.step) for intent in intents if intent.action == "cached"}
    for intent in intents:
        step = intent.step
        if step.stage not in _STAGES or intent.action == "cached":
            continue
        if all(id(source) in is_there for source in step.upstream):
            inputs = {role: _opened(source, store) for role, source in step.inputs.items()}
            step.stage.estimate(step.config, step.stage.inputs(**inputs))
    if recipe.harvest is not None:
        _check_planned(recipe, recipe.harvest.hooks)


def _opened(source: object, store: Store) -> object:
    if isinstance(source, list):
        return [_opened(item, store) for item in source]
    return open_artifact(store.folder(source.id)) if isinstance(source, Step) else source


def _check_planned(recipe: Recipe, harvested: list[str]) -> None:
    """Compare the hook points that are asked for with the names and patterns of the harvest."""
    for asked in (recipe.probes.hooks or []) if recipe.probes else []:
        if not any(_may_mean(pattern, asked) for pattern in harvested):
            near = near_names(asked, harvested) or f" It stores {', '.join(harvested)}."
            raise HookPointError(f"probes.hooks names {asked!r}, which the section harvest does not store.{near}")
    if recipe.lenses and recipe.lenses.tuned:
        # A number stands for every pattern of numbers here: whether it is a depth is all that counts.
        plain = [re.sub(r"\*|\{[^{}]*\}", "0", pattern) for pattern in harvested]
        if all(depth_of(name) is None for name in plain):
            raise HookPointError(
                f"lenses.tuned needs the residual stream, and the section harvest stores {', '.join(harvested)}. "
                "Add blocks.*.hook_resid_post to harvest.hooks."
            )


def _may_mean(pattern: str, asked: str) -> bool:
    """Say whether a harvest's pattern and a probe's may mean one hook point; layers are looked at by the stages."""
    return _shape(pattern) == _shape(asked)


def _shape(name: str) -> str:
    return re.sub(r"\d+|\*|\{[^{}]*\}", "#", name)
