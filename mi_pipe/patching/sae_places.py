"""Which SAE of a set belongs to which layer when its features or its error are patched, told from configs alone.

One SAE a layer: what is patched is part of one hook point's value, so transcoders and crosscoders, which have no value
of one hook point to take apart, are refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mi_pipe.core.errors import ConfigError, near_names
from mi_pipe.models.hook_points import HookMap, layer_of
from mi_pipe.patching.units import can_be_edited
from mi_pipe.saes.sae_set import SAESet
from mi_pipe.saes.sites import Sites

_MODEL_IDS = ("model-", "train_model-")
"""How ids begin; imported SAEs may name a model in other words, which cannot be compared."""


@dataclass(frozen=True)
class SAEPlace:
    """An SAE as far as its config says."""

    name: str
    sites: Sites
    d_sae: int
    model: str = ""
    """The model that it was trained on: its id, or what an imported SAE says of it, or ""."""

    @property
    def hook(self) -> str:
        """The hook point that it reads and reconstructs."""
        return self.sites.inputs[0]


def places_in(saes: SAESet) -> list[SAEPlace]:
    """Return all SAEs of a set."""
    configs = [saes.config_of(name) for name in saes.names]
    return [
        SAEPlace(
            config["name"],
            Sites(**{key: tuple(value) for key, value in config["sites"].items()}),
            config["d_sae"],
            config["model"],
        )
        for config in configs
    ]


def saes_by_layer(places: Sequence[SAEPlace], asked: Sequence[str] | None) -> dict[int, SAEPlace]:
    """Return the SAE of each layer that has one; `asked` are names or hook points, None means all of `places`.

    Raises ConfigError for what is none of them, for transcoders and crosscoders, and for two SAEs of one layer.
    """
    chosen = list(places) if asked is None else [place for name in asked for place in _meant(name, places)]
    found: dict[int, SAEPlace] = {}
    for place in dict.fromkeys(chosen):
        layer = layer_of(place.hook)
        if place.sites.kind != "sae":
            raise ConfigError(
                f"patch.saes: {place.name} is a {place.sites.kind} ({place.sites.label}), and only the features of "
                f"SAEs of one hook point can be patched. {_choice(places)}"
            )
        if layer is None:
            raise ConfigError(f"patch.saes: {place.name} reads {place.hook}, which is in no layer. {_choice(places)}")
        if layer in found:
            raise ConfigError(
                f"patch.saes: {found[layer].name} and {place.name} are both of layer {layer}; name one a layer."
            )
        found[layer] = place
    if not found:
        raise ConfigError("patch.saes: there are no SAEs to patch.")
    return dict(sorted(found.items()))


def check_places(places: Iterable[SAEPlace], hooks: HookMap, model_id: str) -> None:
    """Raise ConfigError for SAEs of another model or width, or HookPointError for a hook point that there is not."""
    for place in places:
        if place.model.startswith(_MODEL_IDS) and place.model != model_id:
            raise ConfigError(
                f"patch.saes: {place.name} was trained on the model {place.model}, and {model_id} is patched "
                "(name, dtype and revision count)."
            )
        site, width = hooks[place.hook], place.sites.input_widths[0]
        if site.width != width:
            raise ConfigError(
                f"patch.saes: {place.name} reads vectors of width {width}, and {place.hook} of the model has "
                f"{site.width}."
            )
        if not can_be_edited(hooks, place.hook) or site.reading is None:
            raise ConfigError(
                f"patch.saes: {place.name} reads {place.hook}, which is not the input or output of one of the model's "
                "own modules and cannot be patched."
            )


def check_features(features: int | list[int], places: Mapping[int, SAEPlace]) -> None:
    """Raise ConfigError for features that one of the SAEs does not have."""
    largest = features - 1 if isinstance(features, int) else max(features)
    for place in places.values():
        if largest >= place.d_sae:
            raise ConfigError(
                f"patch.features: {largest} is asked for, and {place.name} has features 0 to {place.d_sae - 1}."
            )


def _meant(name: str, places: Sequence[SAEPlace]) -> list[SAEPlace]:
    """Return the SAE of this name, or those at this hook point."""
    found = [place for place in places if name in (place.name, place.hook)]
    if not found:
        known = [place.name for place in places]
        near = near_names(name, [*known, *(place.hook for place in places)])
        raise ConfigError(f"patch.saes: there is no SAE {name!r}, nor one at such a place.{near} {_choice(places)}")
    return found


def _choice(places: Sequence[SAEPlace]) -> str:
    names = [place.name for place in places if place.sites.kind == "sae" and layer_of(place.hook) is not None]
    return f"Name of these: {', '.join(names)}." if names else "There are no others."
