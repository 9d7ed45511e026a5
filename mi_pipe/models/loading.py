"""Loading: from a handle to hook points (no weights read) and to a model."""

import contextlib
import copy
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mi_pipe.core.errors import ModelError
from mi_pipe.core.vocabulary import Vocabulary
from mi_pipe.models.bridge_sites import has_unknown_parts, map_hooks, probe_tokens, repeat_last_layer, with_vocabulary
from mi_pipe.models.device import DType, pick_device, torch_dtype
from mi_pipe.models.gguf import load_gguf
from mi_pipe.models.handle import ModelHandle
from mi_pipe.models.hook_points import HookMap, HookSite
from mi_pipe.models.info import ModelInfo
from mi_pipe.models.model import Model
from mi_pipe.models.module_sites import module_paths, module_sites
from mi_pipe.models.vocabulary import TokenizerVocabulary

# In models with one fused q, k, v projection the parts are told apart by values; these few layers have random ones.
_FUSED_PROBE_LAYERS = 2
_FUSED_PROBE_VOCAB = 1009
"""A prime, so that no other size is likely to be the same."""


def load_model(handle: ModelHandle, device: str | None = None, dtype: DType | None = None) -> Model:
    """Load a model on `device` (None or "auto": the handle's) in `dtype`; raises ModelError if it cannot be loaded."""
    target = pick_device(handle.device if device in (None, "auto") else device)
    kind = torch_dtype(dtype or handle.dtype)
    module, tokenizer = _load_plain(handle, kind)
    return wrap_hf_model(module.to(target), tokenizer, handle.name)


def wrap_hf_model(module: Any, tokenizer: Any, name: str) -> Model:
    """Make a Model of a HuggingFace causal language model and its tokenizer."""
    hooks, info = hooks_of_config(module.config, name)
    return Model(module, info, hooks, TokenizerVocabulary(tokenizer), partial(_bridge_of, name=name))


@lru_cache(maxsize=4)
def read_hooks(handle: ModelHandle) -> tuple[HookMap, ModelInfo]:
    """Return a model's hook points and sizes from its config alone, before any weights are read."""
    return hooks_of_config(_read_config(handle), handle.name)


def read_vocabulary(handle: ModelHandle) -> Vocabulary:
    """Load a model's tokenizer alone; raises ModelError if it has none."""
    from transformers import AutoTokenizer

    place, options = _place(handle)
    try:
        return TokenizerVocabulary(AutoTokenizer.from_pretrained(place, **options))
    except (OSError, ValueError) as error:
        raise ModelError(f"Model {handle.name!r} has no tokenizer that transformers can load: {error}") from error


def hooks_of_config(config: Any, name: str) -> tuple[HookMap, ModelInfo]:
    """Return the hook points and sizes of the model that a HuggingFace config describes."""
    config = copy.deepcopy(config)
    architecture = _architecture(config, name)
    with contextlib.suppress(NotImplementedError):
        hooks, info = _empty_bridge(config, architecture, "meta")
        if not has_unknown_parts(hooks):
            return hooks, info
    n_layers, d_vocab = config.num_hidden_layers, config.vocab_size
    config.num_hidden_layers, config.vocab_size = min(n_layers, _FUSED_PROBE_LAYERS), _FUSED_PROBE_VOCAB
    config.pad_token_id = None
    hooks, info = _empty_bridge(config, architecture, "cpu")
    hooks = with_vocabulary(hooks, _FUSED_PROBE_VOCAB, d_vocab)
    return repeat_last_layer(hooks, info.n_layers, n_layers), replace(info, n_layers=n_layers, d_vocab=d_vocab)


def _empty_bridge(config: Any, architecture: str, device: str) -> tuple[HookMap, ModelInfo]:
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    from transformers import AutoModelForCausalLM

    with torch.device(device), torch.random.fork_rng(devices=[]):
        module = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    modules: list[HookSite] = []
    with contextlib.suppress(RuntimeError):  # some models look at values, which the meta device has not
        modules = module_sites(module, probe_tokens(device), n_axes=2)
    paths = module_paths(module)
    bridge = build_bridge_from_module(module, architecture, hf_config=config, tokenizer=None, device=device)
    return map_hooks(bridge, paths, modules), ModelInfo.from_bridge_config(bridge.cfg)


def _bridge_of(module: Any, name: str) -> Any:
    # Without tokenizer: TransformerLens would load its own again, by name. Text goes through Model.vocabulary.
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    module.config = copy.deepcopy(module.config)
    module.set_attn_implementation("eager")
    device = str(next(module.parameters()).device)
    architecture = _architecture(module.config, name)
    return build_bridge_from_module(
        module, architecture, hf_config=module.config, tokenizer=None, dtype=module.dtype, device=device
    )


def _architecture(config: Any, name: str) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    named = (getattr(config, "architectures", None) or [None])[0]
    found = named or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if not isinstance(found, str):
        raise ModelError(f"Model {name!r} of type {config.model_type!r} is no causal language model.")
    return found


def _place(handle: ModelHandle) -> tuple[str, dict[str, Any]]:
    if handle.kind == "gguf":
        path = Path(handle.location)
        return str(path.parent), {"gguf_file": path.name}
    options: dict[str, Any] = {"trust_remote_code": handle.trust_remote_code}
    if handle.kind == "hub":
        options["revision"] = handle.revision
    return handle.location, options


def _read_config(handle: ModelHandle) -> Any:
    from transformers import AutoConfig

    place, options = _place(handle)
    try:
        return AutoConfig.from_pretrained(place, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"The config of model {handle.name!r} cannot be read: {error}") from error


def _load_plain(handle: ModelHandle, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if handle.kind == "gguf":
        return load_gguf(Path(handle.location), dtype)
    place, options = _place(handle)
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        # transformers chooses SDPA attention where the model has it, and eager where not (Gemma 2, GPT-J).
        module = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, use_safetensors=True, **options)
    except (OSError, ValueError) as error:
        raise ModelError(f"Model {handle.name!r} cannot be loaded: {error}") from error
    return module, tokenizer
