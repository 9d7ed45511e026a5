"""`sae.cfg` answers what SAEBench 0.6 and SAELens 6 ask of an SAE, and takes what they add."""

import json

import torch

from bench.sae_formats.samples import READ, WRITTEN, every_sae
from mi_pipe.saes.sae import SAE

# What sae_bench/sae_bench_utils/general_utils.py (0.6) looks up in _standardize_sae_cfg, and then sets on both.
STANDARD = (
    *("hook_name", "hook_layer", "context_size", "dataset_trust_remote_code", "model_name"),
    *("hook_head_index", "model_from_pretrained_kwargs", "prepend_bos", "exclude_special_tokens"),
)


def sae_named(name: str) -> SAE:
    return next(sae for sae in every_sae(8, 16, 2) if sae.name == name)


def test_it_says_what_the_sae_is():
    cfg = sae_named("gated").cfg
    assert (cfg.d_in, cfg.d_sae, cfg.model_name, cfg.architecture) == (8, 16, "toy", "gated")
    assert (cfg.hook_name, cfg.hook_layer, cfg.dtype, cfg.device) == ("blocks.3.hook_resid_post", 3, "float32", "cpu")
    assert (cfg.metadata.hook_name, cfg.metadata.model_name) == (cfg.hook_name, cfg.model_name)
    assert cfg.apply_b_dec_to_input
    through = sae_named("jumprelu.transcoder").cfg
    assert (through.metadata.hook_name, through.metadata.hook_name_out) == (READ, WRITTEN)
    assert not through.apply_b_dec_to_input


def test_what_was_never_noted_is_none_as_with_saelens():
    metadata = sae_named("topk").cfg.metadata
    assert metadata.exclude_special_tokens is None
    assert not hasattr(metadata, "__nothing__")


def test_programs_may_add_to_it_and_it_stays():
    sae = sae_named("topk")
    for name in STANDARD:
        found = getattr(sae.cfg, name, None)
        setattr(sae.cfg, name, found)
        setattr(sae.cfg.metadata, name, found)
    sae.cfg.model_name = "gpt2-small"
    assert sae.cfg.model_name == "gpt2-small"
    assert sae.cfg is sae.cfg
    assert json.loads(json.dumps(sae.cfg.to_dict()))["model_name"] == "gpt2-small"


def test_dtype_follows_the_weights():
    sae = sae_named("topk").to(torch.bfloat16)
    assert sae.cfg.dtype == "bfloat16"
    assert sae.to(torch.float32).cfg.dtype == "float32"
