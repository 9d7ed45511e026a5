"""Steered runs that leave out the blocks before the hook point: equal to whole runs, and whole where they must be."""

import copy

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from mi_pipe.models.hook_points import layer_of
from mi_pipe.patching.known_blocks import n_before
from mi_pipe.steering.direction import Direction
from mi_pipe.steering.measuring import text_losses
from tests.patching.conftest import D_VOCAB, make_model
from tests.steering.test_measuring import run_with_hook

COEFFICIENTS = [-1.0, 0.0, 2.0]
HOOKS = [
    "hook_embed",
    "blocks.0.hook_resid_pre",
    "blocks.1.hook_resid_pre",
    "blocks.0.hook_resid_post",
    "blocks.1.attn.hook_z",
    "blocks.1.hook_attn_out",
    "ln_final.hook_in",
]


def tokens() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(4).integers(3, D_VOCAB, (3, 6)))


def directions(model) -> list[Direction]:
    draw = torch.Generator().manual_seed(3)
    return [Direction.of(hook, torch.randn(model.hooks[hook].width, generator=draw), scale=3.0) for hook in HOOKS]


def test_at_every_place_the_numbers_are_those_of_whole_runs(model):
    some, steered = tokens(), directions(model)
    found = text_losses(model, steered, COEFFICIENTS, some, 13)
    for i, direction in enumerate(steered):
        for k, coefficient in enumerate(COEFFICIENTS):
            logits = run_with_hook(model, some, direction, coefficient)
            expected = cross_entropy(logits[:, :-1].transpose(1, 2), some[:, 1:], reduction="none").mean(1)
            np.testing.assert_allclose(found[i, k], expected.numpy(), rtol=1e-5, atol=1e-6)


def test_blocks_before_the_hook_point_run_once(model):
    runs = [0] * model.info.n_layers
    handles = []
    for layer, block in enumerate(model.blocks):
        attention = next(part for name, part in block.named_children() if "att" in name)

        def count(*_args, layer=layer):
            runs[layer] += 1

        handles.append(attention.register_forward_hook(count))
    last = model.info.n_layers - 1
    direction = Direction.of(f"blocks.{last}.hook_resid_pre", torch.ones(32))
    text_losses(model, [direction], [0.0, 1.0, 2.0], tokens(), 6)
    for handle in handles:
        handle.remove()
    assert runs[:last] == [3] * last
    assert runs[last] == 3 + 1 + 6


def test_models_whose_blocks_share_more_are_run_whole():
    llama = make_model("llama_gqa")
    first, later = llama.blocks[0], llama.blocks[2]
    seen = {}
    run_first, run_later = copy.copy(first.forward), copy.copy(later.forward)

    def keeps(hidden, **options):
        seen["hidden"] = hidden
        return run_first(hidden, **options)

    first.forward = keeps
    later.forward = lambda hidden, **options: run_later(hidden + seen["hidden"], **options)
    direction = Direction.of("blocks.2.hook_resid_pre", torch.ones(32))
    found = text_losses(llama, [direction], [1.0], tokens(), 6)
    logits = run_with_hook(llama, tokens(), direction, 1.0)
    expected = cross_entropy(logits[:, :-1].transpose(1, 2), tokens()[:, 1:], reduction="none").mean(1)
    np.testing.assert_allclose(found[0, 0], expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize(("hook", "n"), [*((hook, None) for hook in HOOKS), ("rotary_emb.hook_in", 0)])
def test_no_block_is_left_out_that_the_hook_point_may_change(llama, hook, n):
    layer = layer_of(hook)
    expected = {"hook_embed": 0, "ln_final.hook_in": 3, "blocks.0.hook_resid_post": 1}.get(hook, layer)
    assert n_before(llama, hook) == (expected if n is None else n)
