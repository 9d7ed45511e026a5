"""Models: hook names with shapes before weights, plain module equal to the bridge, clear refusals."""

import json
import shutil

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from mi_pipe.core.errors import ConfigError, HookPointError, ModelError
from mi_pipe.models.device import pick_device
from mi_pipe.models.handle import resolve_model
from mi_pipe.models.loading import load_model, read_hooks, wrap_hf_model
from mi_pipe.models.trained import native_module, wrap_native
from tests.models.tiny import TOY_FIELDS, save_tiny_llama, tiny_tokenizer

SMALL = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0}
FAMILIES = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=32, n_head=4, **SMALL)),
    "neox": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(num_hidden_layers=3, hidden_size=32, num_attention_heads=4, intermediate_size=64, **SMALL)
    ),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=3,
            hidden_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            **SMALL,
        )
    ),
}


@pytest.fixture(params=[*FAMILIES, "native"])
def model(request):
    torch.manual_seed(0)
    if request.param == "native":
        return wrap_native(native_module(TOY_FIELDS))
    return wrap_hf_model(FAMILIES[request.param](), tiny_tokenizer(), request.param)


def test_plain_model_equals_bridge_and_stays_plain(model):
    tokens = torch.randint(0, 60, (2, 9))
    before = model.logits(tokens)
    torch.testing.assert_close(model.bridge(tokens), before, atol=2e-5, rtol=1e-5)
    assert "Bridge" not in type(model.blocks[0]).__name__
    torch.testing.assert_close(model.logits(tokens), before)


def test_every_native_site_reads_what_the_bridge_caches(model):
    tokens = torch.randint(0, 60, (2, 9))
    _, cache = model.bridge.run_with_cache(tokens)
    names = [site.name for site in model.hooks if site.module_path and site.shape and site.name in cache]
    seen = {}
    with model.edited({name: lambda value, name=name: seen.__setitem__(name, value) for name in names}):
        model.logits(tokens)
    assert len(names) > 15 * model.info.n_layers
    for name in names:
        assert cache[name].shape[2:] == model.hooks[name].shape, name
        torch.testing.assert_close(seen[name].reshape(cache[name].shape), cache[name], atol=2e-5, rtol=1e-4)


def test_an_edit_at_a_hook_point_changes_the_logits_as_the_bridge_does(model):
    tokens = torch.randint(0, 60, (2, 9))
    name = "blocks.1.attn.hook_z"
    expected = model.bridge.run_with_hooks(tokens, fwd_hooks=[(name, lambda z, hook: z * 0.5)])
    with model.edited({name: lambda z: z * 0.5}):
        torch.testing.assert_close(model.logits(tokens), expected, atol=2e-5, rtol=1e-4)


def test_wrong_hook_names_are_answered_with_near_names_or_the_layers(model):
    with pytest.raises(HookPointError, match=r"Did you mean .*blocks\.1\.hook_resid_post"):
        model.hooks["blocks.1.hook_resid_pots"]
    with pytest.raises(HookPointError, match=r"layers 0 to \d, not 40"):
        model.hooks["blocks.40.hook_resid_post"]


def test_parts_of_the_model_make_its_logits(model):
    tokens = torch.randint(0, 60, (2, 9))
    last = {}
    with model.edited({f"blocks.{model.info.n_layers - 1}.hook_resid_post": lambda v: last.update(resid=v)}):
        logits = model.logits(tokens)
    torch.testing.assert_close(model.unembedding(model.final_norm(last["resid"])), logits, atol=1e-5, rtol=1e-4)
    assert model.W_U.shape == (model.info.d_model, model.info.d_vocab)


def test_a_local_folder_loads_and_its_id_does_not_depend_on_the_path(tmp_path, store):
    folder = save_tiny_llama(tmp_path / "a")
    shutil.copytree(folder, tmp_path / "b")
    first, second = resolve_model(str(folder), store), resolve_model(str(tmp_path / "b"), store)
    assert first.id == second.id
    assert first.id != resolve_model(str(folder), store, dtype="bfloat16").id
    hooks, info = read_hooks(first)
    assert hooks["blocks.1.hook_resid_post"].shape == (info.d_model,)
    model = load_model(first, "cpu")
    assert model.vocabulary.text(model.vocabulary.encode(" b")[0]) == " b"
    assert model.logits(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, info.d_vocab)


def test_changed_weights_change_the_id(tmp_path, store):
    folder = save_tiny_llama(tmp_path / "a", seed=0)
    before = resolve_model(str(folder), store).id
    shutil.rmtree(folder)
    save_tiny_llama(folder, seed=1)
    assert resolve_model(str(folder), store).id != before


def test_a_hub_name_is_served_from_the_local_cache_by_commit(tmp_path, store, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache = tmp_path / "hub" / "models--someone--tiny"
    save_tiny_llama(cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    handle = resolve_model("someone/tiny", store)
    assert (handle.kind, handle.revision) == ("hub", commit)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), r"has no weights \(\*\.safetensors\)"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "never loaded"),
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_before_loading(tmp_path, store, prepare, message):
    folder = save_tiny_llama(tmp_path / "m")
    prepare(folder)
    with pytest.raises(ModelError, match=message):
        resolve_model(str(folder), store)


def test_unknown_models_are_answered_with_what_can_be_had(store, monkeypatch):
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="mi-pipe models pull smollm2-135m"):
        resolve_model("smollm2-135m", store)
    with pytest.raises(ModelError, match="Did you mean 'smollm2-135m'"):
        resolve_model("smollm-135m", store)
    with pytest.raises(ModelError, match="does not exist"):
        resolve_model("./nowhere", store)
    with pytest.raises(ModelError, match="GGUF file"):
        resolve_model("nowhere.gguf", store)


def test_devices_are_found_or_refused_by_name():
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ConfigError, match="use auto"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="not available on this machine: found cpu"):
            pick_device("cuda")


def test_the_tiny_tokenizer_round_trips(tmp_path):
    folder = save_tiny_llama(tmp_path / "m")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    assert AutoTokenizer.from_pretrained(folder).decode([3]) != ""


@pytest.mark.real_model
def test_smollm2_knows_indirect_objects_and_matches_the_bridge(smollm2):
    model = load_model(smollm2, "cpu")
    text = "When Mary and John went to the store, John gave a drink to"
    tokens = torch.tensor([[model.vocabulary.bos_id, *model.vocabulary.encode(text)]])
    logits = model.logits(tokens)
    assert model.vocabulary.text(int(logits[0, -1].argmax())) == " Mary"
    torch.testing.assert_close(model.bridge(tokens), logits, atol=2e-4, rtol=1e-4)
