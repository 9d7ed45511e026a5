"""The fast path gives what TransformerLens caches, runs nothing it need not, and computes in what is asked for."""

import numpy as np
import pytest
import torch

from mi_pipe.activations.forward import ForwardPass
from mi_pipe.activations.hook_selection import select_hooks
from mi_pipe.activations.plan import Batch
from mi_pipe.activations.precision import pick_precision, round_weights
from mi_pipe.core.errors import HookPointError
from mi_pipe.models.device import multiplies_bfloat16
from mi_pipe.models.loading import wrap_hf_model
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


def test_every_hook_point_equals_the_bridge_cache_in_float32(model):
    _, cache = model.bridge.run_with_cache(torch.from_numpy(TOKENS).long())
    names = [site.name for site in model.hooks if site.shape]
    native = [name for name in names if model.hooks[name].module_path]
    bridged = [name for name in names if not model.hooks[name].module_path]
    assert len(native) > 30
    for group, needs_bridge in ((native, False), (bridged, True), ([native[5], bridged[0]], True)):
        forward = ForwardPass(model, group, "float32", "float32")
        assert forward.needs_bridge == needs_bridge
        for name, rows in forward.exact(TOKENS, ALL).items():
            expected = cache[name].flatten(2).flatten(0, 1).numpy()
            assert np.abs(rows - expected).max() <= 1e-5 * np.abs(expected).max(), name


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
        select_hooks(["blocks.0.attn.hook_pattern"], hooks)


def test_auto_is_mixed_just_where_bfloat16_products_are_fast():
    cpu = torch.device("cpu")
    assert pick_precision("auto", cpu) == ("mixed" if multiplies_bfloat16(cpu) else "float32")
    assert pick_precision("mixed", cpu) == "mixed"
