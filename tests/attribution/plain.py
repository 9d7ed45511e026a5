"""Patching with plain module hooks, one cell at a time, for models of tests/circuits/tiny.py, apart from mi_pipe.

A place is a function (value -> view of the node's part) at the output or input of one module.
"""

import copy
from dataclasses import dataclass

import torch

from mi_pipe.models.model import as_logits
from tests.circuits import tiny

NAMES = ["gpt2", "neox", "llama_gqa", "native"]
_ATTN = {"gpt2": "attn", "neox": "attention", "llama_gqa": "self_attn", "gemma2": "self_attn", "qwen3": "self_attn"}
_OUT = {"gpt2": "c_proj", "neox": "dense", "llama_gqa": "o_proj", "gemma2": "o_proj", "qwen3": "o_proj"}
_DOWN = {"gpt2": "c_proj", "neox": "dense_4h_to_h", "llama_gqa": "down_proj"}


@dataclass
class Place:
    module: torch.nn.Module
    is_input: bool
    part: object


def blocks(name, module):
    if name.startswith("native"):
        return module.layers
    return {"gpt2": lambda m: m.transformer.h, "neox": lambda m: m.gpt_neox.layers}.get(name, lambda m: m.model.layers)(
        module
    )


def place(name, model, kind, layer, index=None, pos=None):
    """Where a node lies: `index` is a head, key/value head or neuron, `pos` None means all positions."""
    block, d = blocks(name, model.module)[layer], model.info.d_head
    at = slice(None) if pos is None else pos
    attention = getattr(block, _ATTN.get(name, "attn"))
    columns = slice(index * d, (index + 1) * d) if isinstance(index, int) else None
    if kind in ("embed", "resid_pre"):
        return Place(block, True, lambda v: v[:, at])
    if kind == "resid_post":
        return Place(block, False, lambda v: v[:, at])
    if kind == "attn_out":
        return Place(attention, False, lambda v: v[:, at])
    if kind == "mlp_out":
        return Place(block.mlp, False, lambda v: v[:, at])
    if kind == "neuron":
        return Place(getattr(block.mlp, _DOWN.get(name, "fc_out")), True, lambda v: v[:, at, index])
    if kind == "z":
        return Place(getattr(attention, _OUT.get(name, "o")), True, lambda v: v[:, at, columns])
    if name == "gpt2":
        start = "qkv".index(kind) * model.info.n_heads * d
        return Place(attention.c_attn, False, lambda v: v[:, at, start + index * d : start + (index + 1) * d])
    if name == "neox":
        start = index * 3 * d + "qkv".index(kind) * d
        return Place(attention.query_key_value, False, lambda v: v[:, at, start : start + d])
    own = getattr(attention, kind if name.startswith("native") else f"{kind}_proj")
    return Place(own, False, lambda v: v[:, at, columns])


def hooked(where, function):
    """Register `function(value) -> new value or None` at a place; a tuple's first item is the value."""
    if where.is_input:

        def before(_m, args, kwargs):
            value = args[0] if args else kwargs["hidden_states"]
            new = function(value)
            if new is None:
                return None
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        return where.module.register_forward_pre_hook(before, with_kwargs=True)

    def after(_m, _a, output):
        value = output[0] if isinstance(output, tuple) else output
        new = function(value)
        if new is None:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return where.module.register_forward_hook(after)


def metric_of(pairs):
    rows = torch.arange(len(pairs))
    return lambda logits: logits[rows, pairs.answer] - logits[rows, pairs.wrong]


def run(model, tokens, pairs, hooks=()):
    """Return the metric with (place, function) hooks."""
    handles = [hooked(where, function) for where, function in hooks]
    try:
        return metric_of(pairs)(as_logits(model.module(tokens))[:, -1])
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def patched(model, where, base, donor, pairs, scale=1.0):
    """Return the metric with `scale` of the way from base's to donor's value at a place."""
    seen = []
    run(model, donor, pairs, [(where, lambda v: seen.append(v.clone()))])

    def replace(value):
        value = value.clone()
        part = where.part(value)
        part += scale * (where.part(seen[0]) - part)
        return value

    return run(model, base, pairs, [(where, replace)])


def sizes(model, kind):
    info = model.info
    if kind in ("z", "q"):
        return range(info.n_heads)
    if kind in ("k", "v"):
        return range(info.n_kv_heads)
    return range(0, info.d_mlp, 7) if kind == "neuron" else [None]


def derivative(model, where, base, donor, pairs):
    """Return the derivative of the metric on the way from base's to donor's value, by autograd of the way alone."""
    seen = []
    with torch.no_grad():
        run(model, donor, pairs, [(where, lambda v: seen.append(v.clone()))])
    scale = torch.zeros(len(pairs), dtype=torch.float64, requires_grad=True)

    def replace(value):
        value = value.clone()
        part = where.part(value)
        part += scale.view(-1, *[1] * (part.ndim - 1)) * (where.part(seen[0]) - part.detach())
        return value

    with torch.enable_grad():
        return torch.autograd.grad(run(model, base, pairs, [(where, replace)]).sum(), scale)[0]


def finite_difference(model, where, base, donor, pairs, step=1e-5):
    """Return the same by central differences; Llama's norms compute in float32, too coarse for it."""
    up, down = (patched(model, where, base, donor, pairs, scale) for scale in (step, -step))
    return (up - down) / (2 * step)


def linear_model():
    """A native model without norms whose attention is uniform: its logits are linear in its embeddings."""
    return _scaled_queries(0.0)


def sharp_model():
    """The same model with queries so large that softmaxes saturate."""
    return _scaled_queries(60.0)


def _scaled_queries(factor):
    found = tiny.model("native_no_norm")
    twin = copy.deepcopy(found.module)
    with torch.no_grad():
        for block in twin.layers:
            block.attn.q.weight.mul_(factor)
            block.attn.q.bias.mul_(factor)
    return type(found)(twin, found.info, found.hooks, found.vocabulary, found._wrap)
