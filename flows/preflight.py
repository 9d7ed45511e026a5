"""What can be known before any work begins: hook points, and that the hooks of SAEs are harvested."""

from flows.recipe import Recipe
from mi_pipe.core.errors import ConfigError, near_names
from mi_pipe.core.store import Store
from mi_pipe.models.handle import resolve_model
from mi_pipe.models.hook_points import HookMap
from mi_pipe.models.source import source_hooks
from mi_pipe.models.trained import native_module, wrap_native
from stages import harvest
from stages.train_model import model_fields


def check_recipe(recipe: Recipe, store: Store) -> None:
    """Raise HookPointError or ConfigError for what would fail only after hours."""
    if recipe.harvest is None:
        return
    harvested = harvest.hook_names(recipe.harvest, _hooks(recipe, store))
    for hook in (recipe.saes.hooks if recipe.saes else None) or ():
        if hook not in harvested:
            raise ConfigError(
                f"saes.hooks names {hook!r}, which harvest.hooks does not store.{near_names(hook, harvested)}"
            )


def _hooks(recipe: Recipe, store: Store) -> HookMap:
    if recipe.train_model:
        return wrap_native(native_module(model_fields(recipe.train_model))).hooks
    section = recipe.model
    assert section.name is not None, "load_recipe has checked that there is a model"
    return source_hooks(resolve_model(section.name, store, revision=section.revision))[0]
