"""Metrics and losses under steering against written-out mathematics and plain hooks."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from mi_pipe.patching.metrics import find_metric, logit_diff
from mi_pipe.prompts.prompt_set import PairGroup
from mi_pipe.steering.direction import Direction
from mi_pipe.steering.measuring import metric_values, text_losses
from tests.patching.conftest import D_VOCAB, make_model
from tests.steering.toy import WIDTH, linear_toy

HOOK = "blocks.0.hook_resid_post"
COEFFICIENTS = [-2.0, 0.0, 0.5, 3.0]


def group(d_vocab: int = D_VOCAB, n_pairs: int = 3, n_pos: int = 5) -> PairGroup:
    rng = np.random.default_rng(1)
    clean, corrupted = torch.from_numpy(rng.integers(3, d_vocab, (2, n_pairs, n_pos)))
    answer = torch.from_numpy(rng.integers(3, d_vocab - 9, n_pairs))
    return PairGroup(np.arange(n_pairs), clean, corrupted, answer, answer + 5, [])


def a_direction(width: int, hook: str = HOOK, scale: float = 1.5) -> Direction:
    return Direction.of(hook, torch.randn(width, generator=torch.Generator().manual_seed(2)), scale=scale)


@pytest.mark.parametrize("hook", [HOOK, "hook_embed", "ln_final.hook_in"])
def test_a_linear_model_shifts_by_just_the_direction_read_out(hook):
    toy, pairs = linear_toy(), group(24)
    steering = a_direction(WIDTH, hook)
    with torch.no_grad():
        logits = toy.logits(pairs.clean)[:, -1]
    shift = 1.5 * steering.unit @ toy.W_U
    values = metric_values(toy, [steering], COEFFICIENTS, pairs, find_metric("logit_diff"), False, 1000)
    for k, coefficient in enumerate(COEFFICIENTS):
        expected = logit_diff(logits + coefficient * shift, pairs.answer, pairs.wrong)
        np.testing.assert_allclose(values[0, k], expected.numpy(), rtol=1e-5, atol=1e-5)


def test_a_planted_direction_raises_the_metric():
    toy, pairs = linear_toy(), group(24)
    planted = toy.W_U[:, pairs.answer[0]] - toy.W_U[:, pairs.wrong[0]]
    steering = Direction.of(HOOK, planted)
    values = metric_values(toy, [steering], [-1, 0, 1], pairs, find_metric("logit_diff"), True, 1000)[0, :, 0]
    np.testing.assert_allclose(np.diff(values), float(planted.square().sum()), rtol=1e-4)


@pytest.mark.parametrize("metric", ["logit_diff", "kl", "loss"])
def test_metrics_are_those_of_a_plain_hook_loop_and_0_is_the_model(model, metric):
    pairs, steering = group(), a_direction(model.info.d_model)
    found = metric_values(model, [steering], COEFFICIENTS, pairs, find_metric(metric), False, 12)
    with torch.no_grad():
        base = model.logits(pairs.clean)[:, -1].float()
    for k, coefficient in enumerate(COEFFICIENTS):
        logits = run_with_hook(model, pairs.clean, steering, coefficient)[:, -1].float()
        expected = {
            "logit_diff": lambda x: logit_diff(x, pairs.answer, pairs.wrong),
            "kl": lambda x: (base.softmax(-1) * (base.log_softmax(-1) - x.log_softmax(-1))).sum(-1),
            "loss": lambda x: cross_entropy(x, pairs.answer, reduction="none"),
        }[metric](logits)
        np.testing.assert_allclose(found[0, k], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_at_the_end_only_the_last_position_moves(llama):
    pairs, steering = group(), a_direction(32)
    found = metric_values(llama, [steering], [1.0], pairs, find_metric("logit_diff"), True, 1000)
    logits = run_with_hook(llama, pairs.clean, steering, 1.0, first_pos=4)[:, -1]
    expected = logit_diff(logits, pairs.answer, pairs.wrong)
    np.testing.assert_allclose(found[0, 0], expected.numpy(), rtol=1e-4, atol=1e-5)


def test_losses_are_those_of_a_plain_hook_loop_and_0_is_bit_for_bit_the_model(model):
    tokens, steering = group(n_pairs=4, n_pos=9).clean, a_direction(model.info.d_model)
    other = a_direction(model.info.d_model, "blocks.1.hook_resid_pre", 4.0)
    found = text_losses(model, [steering, other], COEFFICIENTS, tokens, 1000)
    with torch.no_grad():
        base = model.logits(tokens)
    exact = [
        cross_entropy(x[:-1].float(), ids[1:], reduction="none").double().mean()
        for x, ids in zip(base, tokens, strict=True)
    ]
    np.testing.assert_array_equal(found[:, 1], np.float32([exact, exact]))
    for i, direction in enumerate((steering, other)):
        for k, coefficient in enumerate(COEFFICIENTS):
            logits = run_with_hook(model, tokens, direction, coefficient)
            expected = cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
            np.testing.assert_allclose(found[i, k], expected.numpy(), rtol=1e-4, atol=1e-5)
    few = text_losses(model, [steering], COEFFICIENTS, tokens, 20)
    np.testing.assert_allclose(few, found[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "path"), [("gpt2", "transformer.h.1.attn"), ("llama_gqa", "model.layers.1.self_attn"),
                       ("gemma2", "model.layers.1.post_attention_layernorm")],
)  # fmt: skip
def test_what_is_added_between_attention_and_mlp_stays_in_the_residual_stream(name, path):
    model, tokens = make_model(name), group().clean
    steering = a_direction(32, "blocks.1.hook_resid_mid")
    found = text_losses(model, [steering], [2.0], tokens, 1000)[0, 0]

    def after(_module, _args, output):
        return (output[0] + steering.step(2.0), *output[1:]) if isinstance(output, tuple) else output + steering.step(2)

    handle = model.module.get_submodule(path).register_forward_hook(after)
    with torch.no_grad():
        logits = model.logits(tokens)
    handle.remove()
    expected = cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


def run_with_hook(model, tokens, direction, coefficient, first_pos=0):
    """Run the plain model with torch's own hook."""
    site = model.hooks[direction.hook]
    step = coefficient * direction.scale * direction.unit

    def after(_module, _args, output):
        value = output[0] if isinstance(output, tuple) else output
        moved = value.clone()
        moved[:, first_pos:] += step
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    def before(_module, args, kwargs):
        value = args[0] if args else kwargs["hidden_states"]
        moved = value.clone()
        moved[:, first_pos:] += step
        return ((moved, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": moved})

    module = model.module.get_submodule(site.module_path)
    is_out = site.side == "out"
    handle = (
        module.register_forward_hook(after) if is_out else module.register_forward_pre_hook(before, with_kwargs=True)
    )
    with torch.no_grad():
        logits = model.logits(tokens)
    handle.remove()
    return logits
