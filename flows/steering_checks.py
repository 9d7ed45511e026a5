"""What of a recipe's steering can be known to fail before any work: what directions are made from, and hook points."""

from typing import TYPE_CHECKING

from mi_pipe.core.errors import ConfigError, near_names
from mi_pipe.models.hook_points import HookMap
from mi_pipe.models.source import ModelSource, source_vocabulary
from mi_pipe.steering.batches import encode_prompts
from mi_pipe.steering.config import ContrastConfig, DirectionConfig, SteeringConfig
from mi_pipe.steering.direction import check_hook

if TYPE_CHECKING:
    from flows.recipe import Recipe

_TEXT = "prompts"
_EVERY_NUMBER = "each"


def check_sources(recipe: "Recipe", place: str) -> None:
    """Raise ConfigError for directions from probes, SAEs or prompts that the recipe does not have."""
    for name, direction in recipe.steering.directions.items() if recipe.steering else ():
        where = f"{place}: steering.directions.{name}"
        if direction.feature is not None and not (recipe.saes or recipe.trained_saes):
            raise ConfigError(f"{where} is of an SAE's feature; add a section 'saes' or 'trained_saes'.")
        if direction.contrast is not None:
            _check_prompts(recipe, direction.contrast, where)
        if direction.probe is not None:
            _check_probe(recipe, direction, where)


def _check_prompts(recipe: "Recipe", contrast: ContrastConfig, where: str) -> None:
    known = [*recipe.tasks, *([_TEXT] if recipe.prompts or recipe.activations else [])]
    if contrast.prompts is not None and contrast.prompts not in known:
        near = near_names(contrast.prompts, known)
        raise ConfigError(
            f"{where}: contrast.prompts is {contrast.prompts!r}, which is no task of the recipe, nor its section "
            f"'prompts' ({', '.join(known) or 'there are none'}).{near}"
        )


def _check_probe(recipe: "Recipe", direction: DirectionConfig, where: str) -> None:
    assert recipe.steering is not None, "asked only then"
    assert direction.probe is not None, "asked only then"
    if recipe.steering.probes is not None:
        return
    if recipe.probes is None:
        raise ConfigError(
            f"{where} is of a probe; add a section 'probes', or name probes that are there (steering.probes)."
        )
    label, known = direction.probe.label, list(recipe.probes.labels)
    if label not in known:
        near = near_names(label, known)
        raise ConfigError(f"{where}: the section 'probes' has no label {label!r}.{near} It has {', '.join(known)}.")
    if "linear" not in recipe.probes.fit.kinds:
        raise ConfigError(f"{where} is of a linear probe: add linear to probes.fit.kinds.")
    positions = recipe.probes.positions
    position = direction.probe.position_of(positions)
    if position not in positions and not (_EVERY_NUMBER in positions and position.isdecimal()):
        raise ConfigError(
            f"{where}: probe.position is {position!r}; the section 'probes' has positions {', '.join(positions)}."
        )


def check_planned_steering(config: SteeringConfig, hooks: HookMap, model: ModelSource | None) -> None:
    """Raise HookPointError or PromptError for hook points and texts that do not fit the recipe's model.

    `model` is None while it is still to be trained: then texts are looked at when the stage's turn comes.
    """
    for direction in config.directions.values():
        if direction.hook is not None:
            check_hook(hooks, direction.hook)
    texts = [text for direction in config.directions.values() for text in _texts(direction)]
    texts += (config.generation.prompts or ()) if config.generation else ()
    if texts and model is not None:
        encode_prompts(source_vocabulary(model), texts)


def _texts(direction: DirectionConfig) -> list[str]:
    contrast = direction.contrast
    if contrast is None or contrast.prompts is not None:
        return []
    return [*contrast.positive, *contrast.negative]
