"""The fast path gives what TransformerLens caches, runs nothing it need not, and computes in what is asked for."""

import numpy as np
import pytest
import torch

from mi_pipe.activations.harvest.forward import ForwardPass
from mi_pipe.activations.harvest.hook_selection import array_layouts, at_lengths, select_hooks
from mi_pipe.activations.harvest.plan import Batch
from mi_pipe.activations.harvest.precision import pick_precision, round_weights
from mi_pipe.core.errors import HookPointError
from mi_pipe.models.device import multiplies_bfloat16
from mi_pipe.models.loading import load_model, wrap_hf_model
from mi_pipe.models.trained import native_module, wrap_native
from tests.models.test_models import FAMILIES
from tests.models.tiny import TOY_FIELDS, tiny_tokenizer

TOKENS = np.random.default_rng(0).integers(0, 60, (3, 9)).astype(np.int32)
ALL = np.ones(TOKENS.shape, bool)


def make_model(family):
    torch.manual_seed(0)
    if family == "native":
        return wrap_native(native_module({**TOY_FIELDS, "attn_only": False, "d_mlp": 64, "act_fn": "gelu"}))
    return wrap_hf_model(FAMILIES[family](), tiny_tokenizer(), family)


@pytest.fixture(params=[*FAMILIES, "native"])
def model(request):
    return make_model(request.param)


# What the field stores: every one of these is read from the plain model, at SDPA's speed but for patterns.
KINDS = [
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "attn.hook_z",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "mlp.hook_pre",
    "mlp.hook_post",
    "ln1.hook_normalized",
    "ln2.hook_normalized",
    "attn.hook_pattern",
]


def expected_rows(model, cache, name):
    """A row is a token: of a pattern (batch, head, query, key) it is the query, with all heads and keys."""
    value = cache[name].transpose(1, 2) if model.hooks[name].pattern_heads else cache[name]
    return value.flatten(2).flatten(0, 1).numpy()


def assert_equal(found, expected, name):
    assert found.shape == expected.shape, name
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max(), name


def test_every_kind_is_read_from_the_plain_model_and_equals_the_bridge_cache(model):
    _, cache = model.bridge.run_with_cache(torch.from_numpy(TOKENS).long())
    names = [f"blocks.1.{kind}" for kind in KINDS]
    if model.info.parallel_attn_mlp:
        names.remove("blocks.1.hook_resid_mid")
    for group in (names, names[:-1], *([name] for name in names)):
        forward = ForwardPass(model, group, "float32", "float32")
        assert not forward.needs_bridge
        found = forward.exact(TOKENS, ALL)
        assert list(found) == group
        for name, rows in found.items():
            assert_equal(rows, expected_rows(model, cache, name), name)


def test_every_hook_point_equals_the_bridge_cache_in_float32(model):
    _, cache = model.bridge.run_with_cache(torch.from_numpy(TOKENS).long())
    names = [site.name for site in model.hooks if site.shape or site.pattern_heads]
    native = [name for name in names if model.hooks[name].reading]
    assert len(native) > 75
    whole = ForwardPass(model, names, "float32", "float32")
    assert whole.needs_bridge == (len(native) < len(names))
    for name, rows in whole.exact(TOKENS, ALL).items():
        assert_equal(rows, expected_rows(model, cache, name), name)


def test_values_that_the_bridge_alone_has_come_beside_those_of_the_plain_model():
    model = make_model("llama")
    _, cache = model.bridge.run_with_cache(torch.from_numpy(TOKENS).long())
    names = ["blocks.2.hook_resid_post", "blocks.1.attn.hook_rot_q", "model.layers.0.mlp.gate_proj"]
    forward = ForwardPass(model, names, "float32", "float32")
    assert forward.needs_bridge
    found = forward.exact(TOKENS, ALL)
    assert list(found) == names
    for name, cached in zip(names, [*names[:2], "blocks.0.mlp.hook_pre"], strict=True):
        assert_equal(found[name], expected_rows(model, cache, cached), name)


def test_patterns_that_a_model_does_not_return_are_left_to_the_bridge(model):
    names = ["blocks.0.hook_resid_post", "blocks.1.attn.hook_pattern"]
    expected = ForwardPass(model, names, "float32", "float32").exact(TOKENS, ALL)
    assert model.bridge, "made before the hooks below, which it would take over"
    for i in range(model.info.n_layers):
        attention = model.submodule(model.hooks[f"blocks.{i}.attn.hook_pattern"].derived.module_path)
        attention.register_forward_hook(lambda _module, _args, output: (output[0], None))
    forward = ForwardPass(model, names, "float32", "float32")
    for _ in range(2):
        for name, rows in forward.exact(TOKENS, ALL).items():
            assert_equal(rows, expected[name], name)
    assert forward.needs_bridge


def test_module_paths_are_hook_points_of_the_plain_model(model):
    path = model.hooks["blocks.1.hook_mlp_out"].module_path
    names = [path, f"{path}.input"]
    seen = {}
    model.submodule(path).register_forward_hook(
        lambda _module, args, output: seen.update(zip(names, (output, args[0]), strict=True))
    )
    found = ForwardPass(model, names, "float32", "float32").exact(TOKENS, ALL)
    for name in names:
        np.testing.assert_array_equal(found[name], seen[name].flatten(0, 1).numpy())
        assert model.hooks[name].shape == seen[name].shape[2:]
    sites = select_hooks([path.replace(".1.", ".*.")], model.hooks)
    assert [site.name for site in sites] == [path.replace(".1.", f".{i}.") for i in range(model.info.n_layers)]
    with pytest.raises(HookPointError, match=f"Did you mean .*{path}"):
        select_hooks([f"{path}q"], model.hooks)


def test_nothing_runs_after_the_last_value(model):
    ran = []
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    model.unembedding.register_forward_pre_hook(lambda *_: ran.append("unembed"))
    names = ["blocks.1.hook_resid_pre", "blocks.0.attn.hook_z"]
    rows = ForwardPass(model, names, "float32", "float32").exact(TOKENS, ALL)
    assert list(rows) == names
    # The hook on block 1's input ends the pass within block 1, before any of its modules run.
    assert set(ran) <= {0, 1}


def test_only_kept_rows_are_returned_in_order(model):
    name = "blocks.0.hook_resid_post"
    forward = ForwardPass(model, [name], "float32", "float16")
    kept = np.random.default_rng(1).random(TOKENS.shape) < 0.5
    whole = forward.stored(TOKENS, ALL)[name].reshape(*TOKENS.shape, -1)
    assert whole.dtype == np.float16
    np.testing.assert_array_equal(forward.rows(Batch(0, TOKENS, kept, np.arange(kept.sum())))[name], whole[kept])


@pytest.mark.parametrize("family", [*FAMILIES, "native"])
def test_mixed_precision_is_autocast_with_a_float32_residual_stream(family):
    names = ["blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.0.hook_mlp_out"]
    plain, rounded = make_model(family), make_model(family)
    with torch.autocast("cpu", torch.bfloat16):
        expected = ForwardPass(plain, names, "float32", "float32").exact(TOKENS, ALL)
    round_weights(rounded.module, "mixed")
    values = {}
    forward = ForwardPass(rounded, names, "mixed", "float32")
    rounded.blocks[1].register_forward_hook(lambda _m, _a, out: values.update(out=out))
    found = forward.exact(TOKENS, ALL)
    for name in names:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    out = values["out"][0] if isinstance(values["out"], tuple) else values["out"]
    assert out.dtype == torch.float32


def test_all_bfloat16_runs_on_every_family(model):
    name = "blocks.1.hook_resid_post"
    exact = ForwardPass(model, [name], "float32", "float32").exact(TOKENS, ALL)[name]
    round_weights(model.module, "bfloat16")
    rows = ForwardPass(model, [name], "bfloat16", "bfloat16").exact(TOKENS, ALL)[name]
    assert 1e-4 < np.abs(rows - exact).max() / np.abs(exact).max() < 0.05


def test_patterns_mean_layers_and_wrong_names_are_refused(model):
    hooks = model.hooks
    every = select_hooks(["blocks.*.hook_resid_post"], hooks)
    assert [site.name for site in every] == [f"blocks.{i}.hook_resid_post" for i in range(model.info.n_layers)]
    some = select_hooks(["blocks.{1, 0}.hook_resid_{pre,post}", "blocks.0.hook_resid_pre"], hooks)
    assert [site.name for site in some] == [f"blocks.{i}.hook_resid_{k}" for i in (1, 0) for k in ("pre", "post")]
    with pytest.raises(HookPointError, match="hook_resid_post"):
        select_hooks(["blocks.0.hook_resid_pots"], hooks)
    with pytest.raises(HookPointError, match=f"layers 0 to {model.info.n_layers - 1}"):
        select_hooks(["blocks.77.hook_resid_post"], hooks)
    with pytest.raises(HookPointError, match="hook_resid_post"):
        select_hooks(["blocks.*.hook_resid_pots"], hooks)
    with pytest.raises(HookPointError, match="no value at each token"):
        select_hooks(["blocks.0.attn.hook_attn_scores"], hooks)


def test_a_row_of_a_pattern_has_all_keys_so_prompts_have_one_length(model):
    sites = select_hooks(["blocks.*.attn.hook_pattern", "blocks.0.hook_resid_post"], model.hooks)
    shaped = at_lengths(sites, np.full(5, 9))
    heads = model.info.n_heads
    assert [site.shape for site in shaped] == [(heads, 9)] * model.info.n_layers + [(model.info.d_model,)]
    layouts = array_layouts(shaped, model.info, "float16", 64)
    assert (layouts[0].dimension, layouts[0].width) == ("head_key", heads * 9)
    with pytest.raises(HookPointError, match="all prompts need the same length; these have 7 to 9 tokens"):
        at_lengths(sites, np.array([9, 7]))
    assert at_lengths(sites[-1:], np.array([9, 7])) == sites[-1:]


def test_auto_is_mixed_just_where_bfloat16_products_are_fast():
    cpu = torch.device("cpu")
    assert pick_precision("auto", cpu) == ("mixed" if multiplies_bfloat16(cpu) else "float32")
    assert pick_precision("mixed", cpu) == "mixed"


@pytest.mark.real_model
def test_every_kind_of_smollm2_equals_the_bridge_cache(smollm2):
    model = load_model(smollm2, "cpu", "float32")
    tokens = np.random.default_rng(0).integers(1, 49_000, (3, 40)).astype(np.int32)
    kinds = [kind for kind in KINDS if kind != "attn.hook_pattern"]
    names = [f"blocks.{layer}.{kind}" for layer in (0, 9, model.info.n_layers - 1) for kind in kinds]
    names.append("ln_final.hook_normalized")
    patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in (0, 9)]
    _, cache = model.bridge.run_with_cache(torch.from_numpy(tokens).long(), return_type=None)
    for group in (names, patterns):
        forward = ForwardPass(model, group, "float32", "float32")
        assert not forward.needs_bridge
        for name, rows in forward.exact(tokens, np.ones(tokens.shape, bool)).items():
            assert_equal(rows, expected_rows(model, cache, name), name)
