"""What of patching parts of SAEs can be known to fail before any work: which SAEs there are, or will be, and where."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from flows.given import Given
from mi_pipe.core.errors import ConfigError
from mi_pipe.patching.sae_places import SAEPlace, check_features, places_in, saes_by_layer
from mi_pipe.saes.sae_set import SAESet
from mi_pipe.saes.sweep import SAESpec

if TYPE_CHECKING:
    from flows.recipe import Recipe


def check_patched(recipe: "Recipe", place: str) -> None:
    """Raise ConfigError for SAEs that are patched and are not in the recipe, and for SAEs that nothing reads."""
    patches = recipe.patch is not None and recipe.patch.reads_saes
    is_read = bool(recipe.harvest or recipe.activations)
    if patches and recipe.saes is None and recipe.trained_saes is None:
        raise ConfigError(f"{place}: patch.units names parts of SAEs; add a section 'saes' or 'trained_saes'.")
    if recipe.features and not is_read:
        raise ConfigError(f"{place}: section 'features' needs a section 'harvest' or 'activations'.")
    if recipe.trained_saes and not (patches or is_read):
        raise ConfigError(
            f"{place}: section 'trained_saes' needs a section 'harvest' or 'activations', or patch.units that name "
            "parts of SAEs."
        )


def check_given(recipe: "Recipe", given: Iterable[Given]) -> None:
    """Raise ConfigError if what is patched is no part of the SAEs that are given."""
    for item in given:
        if item.role == "saes" and isinstance(item.artifact, SAESet):
            _check(recipe, places_in(item.artifact))


def check_planned(recipe: "Recipe", specs: Iterable[SAESpec]) -> None:
    """Raise ConfigError if what is patched is no part of the SAEs that the recipe will train."""
    _check(recipe, [SAEPlace(spec.name, spec.sites, spec.d_sae) for spec in specs])


def _check(recipe: "Recipe", places: list[SAEPlace]) -> None:
    if recipe.patch is not None and recipe.patch.reads_saes:
        check_features(recipe.patch.features, saes_by_layer(places, recipe.patch.saes))
