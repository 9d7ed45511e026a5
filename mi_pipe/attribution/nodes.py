"""Nodes: the places of a model that an effect is attributed to, and the axes of the values there.

| kind | value at a node | axes of a layer's value |
|---|---|---|
| embed | what enters the first block | pair, pos, d_model |
| resid_pre, resid_mid, resid_post, attn_out, mlp_out | the residual stream, what is added | pair, pos, d_model |
| z | what all heads read, before W_O, side by side | pair, pos, head * d_head |
| q | a query head's query | pair, head, pos, d_head |
| k, v | a key/value head's keys, values | pair, kv_head, pos, d_head |
| neuron | an MLP's hidden layer after its nonlinearity (and gate) | pair, pos, d_mlp |

q, k and v are those of the dot product: after rotation, and after a norm of the heads' own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mi_pipe.core.errors import HookPointError
from mi_pipe.models.hook_points import HookMap
from mi_pipe.models.info import ModelInfo

Kind = Literal["embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "neuron"]
KINDS: tuple[Kind, ...] = get_args(Kind)
RESIDUAL: tuple[Kind, ...] = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
BY_HEAD: tuple[Kind, ...] = ("z", "q", "k", "v")
IN_BRANCH: tuple[Kind, ...] = ("attn_out", "mlp_out", *BY_HEAD, "neuron")
"""Kinds whose value reaches the residual stream through their own layer's attention or MLP alone."""
_HOOKS: dict[Kind, str] = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z",
    "q": "attn.hook_out",
    "k": "attn.hook_out",
    "v": "attn.hook_out",
    "neuron": "mlp.hook_post",
}


@dataclass(frozen=True, order=True)
class Site:
    """One kind at one layer (0 for embed): what is recorded, differentiated or replaced together."""

    kind: Kind
    layer: int = 0

    @property
    def is_inside_attention(self) -> bool:
        """Say whether the value is none of a module's: q, k or v as they enter the dot product."""
        return self.kind in ("q", "k", "v")

    @property
    def hook(self) -> str:
        """The hook point of the plain model where the value is, or for q, k and v the attention that has it."""
        return "blocks.0.hook_resid_pre" if self.kind == "embed" else f"blocks.{self.layer}.{_HOOKS[self.kind]}"


def own_hook(site: Site, hooks: HookMap) -> str:
    """Return the site's hook point, or the module's own output where the model scales that first (Granite)."""
    if site.hook not in hooks or hooks[site.hook].module_path is not None:
        return site.hook
    return site.hook.replace(".hook_attn_out", ".attn.hook_out").replace(".hook_mlp_out", ".mlp.hook_out")


def n_layers_of(kind: Kind, info: ModelInfo) -> int:
    """Return how many layers a kind has: 1 for embed."""
    return 1 if kind == "embed" else info.n_layers


def sites_of(kinds: Sequence[Kind], info: ModelInfo) -> list[Site]:
    """Return the sites of these kinds, by kind and layer."""
    return [Site(kind, layer) for kind in kinds for layer in range(n_layers_of(kind, info))]


def axes_of(kind: Kind) -> tuple[str, ...]:
    """Return the names of the axes of a kind's effects beside pair; a neuron's are summed over positions.

    >>> axes_of("k")
    ('layer', 'kv_head', 'pos')
    """
    if kind == "embed":
        return ("pos",)
    if kind == "neuron":
        return ("layer", "neuron")
    if kind in BY_HEAD:
        return ("layer", "kv_head" if kind in ("k", "v") else "head", "pos")
    return ("layer", "pos")


def present_kinds(kinds: Sequence[Kind], hooks: HookMap, info: ModelInfo) -> list[Kind]:
    """Return the kinds that every layer of the model has, in KINDS' order; raises HookPointError if there is none."""

    def has(site: Site) -> bool:
        return site.hook in hooks and hooks[site.hook].module_path is not None

    found: list[Kind] = [kind for kind in KINDS if kind in kinds and all(map(has, sites_of([kind], info)))]
    if not found:
        raise HookPointError(f"The model has none of the nodes {', '.join(kinds)}. Kinds are {', '.join(KINDS)}.")
    return found
