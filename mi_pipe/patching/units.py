"""What can be patched: the units, the hook point that each lies at, and the axes by which it is swept.

Units by position: embed (one value a position, no layers), resid_pre, resid_mid, resid_post, attn_out, mlp_out.
Units by head, all positions at once: head_out (z), q, k, v (before rotation; k and v by key/value head), pattern (the
head attends as in the donor run, to the base run's values). `<unit>_by_pos`: one head at one position.
neuron: chosen neurons of each MLP (after the activation), all positions.
Units of an SAE, at its hook point (mi_pipe/patching/sae_parts.py): sae_feature, what a chosen feature writes, and
sae_error, what the SAE leaves unexplained, each at all positions, or at one (`_by_pos`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mi_pipe.core.errors import HookPointError
from mi_pipe.models.hook_points import HookMap
from mi_pipe.models.info import ModelInfo
from mi_pipe.models.reading import Columns

Unit = Literal[
    "embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out",
    "head_out", "q", "k", "v", "pattern",
    "head_out_by_pos", "q_by_pos", "k_by_pos", "v_by_pos", "pattern_by_pos",
    "neuron",
    "sae_feature", "sae_error", "sae_feature_by_pos", "sae_error_by_pos",
]  # fmt: skip
Axis = Literal["pos", "head", "kv_head", "neuron", "feature"]
UNITS: tuple[Unit, ...] = get_args(Unit)
DEFAULT_UNITS: tuple[Unit, ...] = ("resid_pre", "attn_out", "mlp_out", "head_out")
BY_POS = "_by_pos"


@dataclass(frozen=True)
class _Kind:
    """Where a unit lies in a block, and how it is cut."""

    hook: str
    """Of an SAE's unit, what is added to the name of the SAE's hook point."""
    part: Axis | None = None
    """What its width is cut into; None leaves it whole."""
    has_pos: bool = False
    """Each cell is one position, whatever the unit's name."""
    is_local: bool = True
    """A patch at one position changes the block's output at that position alone."""
    edited_at: str | None = None
    """The hook point whose value is replaced, if it is another."""
    of_sae: bool = False


_KINDS: dict[str, _Kind] = {
    "embed": _Kind("hook_resid_pre", has_pos=True, is_local=False),
    "resid_pre": _Kind("hook_resid_pre", has_pos=True, is_local=False),
    "resid_mid": _Kind("hook_resid_mid", has_pos=True),
    "resid_post": _Kind("hook_resid_post", has_pos=True),
    "attn_out": _Kind("hook_attn_out", has_pos=True),
    "mlp_out": _Kind("hook_mlp_out", has_pos=True),
    "head_out": _Kind("attn.hook_z", "head"),
    "q": _Kind("attn.hook_q", "head"),
    "k": _Kind("attn.hook_k", "kv_head", is_local=False),
    "v": _Kind("attn.hook_v", "kv_head", is_local=False),
    "pattern": _Kind("attn.hook_pattern", "head", edited_at="attn.hook_z"),
    "neuron": _Kind("mlp.hook_post", "neuron"),
    "sae_feature": _Kind("sae_feature", "feature", is_local=False, of_sae=True),
    "sae_error": _Kind("sae_error", is_local=False, of_sae=True),
}


def _kind(unit: Unit) -> _Kind:
    return _KINDS[unit.removesuffix(BY_POS)]


def is_of_sae(unit: Unit) -> bool:
    """Say whether a unit is part of what an SAE makes of a hook point's value."""
    return _kind(unit).of_sae


def hook_of(unit: Unit, layer: int, sae_hook: str | None = None) -> str:
    """Return the hook point whose donor value a unit takes; of an SAE's unit the name of that part of it.

    `sae_hook` is where the layer's SAE is.

    >>> hook_of("head_out", 3)
    'blocks.3.attn.hook_z'
    >>> hook_of("sae_error", 3, "blocks.3.hook_resid_post")
    'blocks.3.hook_resid_post.sae_error'
    """
    if is_of_sae(unit):
        assert sae_hook is not None, "only layers with an SAE are swept"
        return f"{sae_hook}.{_kind(unit).hook}"
    return f"blocks.{layer}.{_kind(unit).hook}"


def edited_hook_of(unit: Unit, layer: int) -> str:
    """Return the hook point whose value is replaced: the unit's own, but z for a pattern."""
    return f"blocks.{layer}.{_kind(unit).edited_at or _kind(unit).hook}"


def axes_of(unit: Unit) -> tuple[Axis, ...]:
    """Return the axes of a unit's values beside pair and layer.

    >>> axes_of("k_by_pos")
    ('kv_head', 'pos')
    """
    kind = _kind(unit)
    parts: tuple[Axis, ...] = () if kind.part is None else (kind.part,)
    return (*parts, "pos") if kind.has_pos or unit.endswith(BY_POS) else parts


def part_of(unit: Unit) -> Axis | None:
    """Return what a unit's width is cut into, None if it is patched whole."""
    return _kind(unit).part


def is_by_pos(unit: Unit) -> bool:
    """Say whether each cell of a unit is one position."""
    return "pos" in axes_of(unit)


def is_local(unit: Unit) -> bool:
    """Say whether a patch at one position leaves the block's output at all others as it was."""
    return _kind(unit).is_local


def layers_of(unit: Unit, info: ModelInfo) -> range:
    """Return the layers that a unit is swept over; embeddings are there once."""
    return range(1 if unit == "embed" else info.n_layers)


def n_parts(unit: Unit, info: ModelInfo, n_chosen: int = 0) -> int:
    """Return how many parts (heads, key/value heads, chosen neurons or features) a unit's width has."""
    sizes = {"head": info.n_heads, "kv_head": info.n_kv_heads, "neuron": n_chosen, "feature": n_chosen}
    return sizes.get(part_of(unit) or "", 1)


def present_units(units: Sequence[Unit], hooks: HookMap, n_layers: int) -> list[Unit]:
    """Return the units that every layer of the model has (an attention-only one has no mlp_out), in UNITS' order.

    Units of SAEs are looked at elsewhere (`sae_places`) and kept. Raises HookPointError for a unit that only the bridge
    can reach, which the plain model cannot be patched at.
    """
    asked: list[Unit] = [unit for unit in UNITS if unit in units]
    layers = range(n_layers)
    found: list[Unit] = [u for u in asked if is_of_sae(u) or all(hook_of(u, layer) in hooks for layer in layers)]
    for unit in found:
        if not is_of_sae(unit) and not all(_is_reachable(hooks, unit, layer) for layer in layers):
            rest = ", ".join(other for other in found if other != unit)
            raise HookPointError(
                f"{unit} of this model is not the input or output of one of its own modules and cannot be patched. "
                f"Leave it out: units=[{rest}]."
            )
    if not found:
        raise HookPointError(f"The model has none of the units {', '.join(units)}. Units are {', '.join(UNITS)}.")
    return found


def _is_reachable(hooks: HookMap, unit: Unit, layer: int) -> bool:
    return can_be_edited(hooks, edited_hook_of(unit, layer)) and hooks[hook_of(unit, layer)].reading is not None


def can_be_edited(hooks: HookMap, hook: str) -> bool:
    """Say whether a hook point's value can be replaced in the plain model: a module's own, or some of its columns."""
    site = hooks[hook]
    return site.module_path is not None or (site.derived is not None and isinstance(site.derived.rule, Columns))
