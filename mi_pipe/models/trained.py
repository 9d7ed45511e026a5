"""Models trained by the pipeline: TransformerLens' native modules, stored as safetensors and a JSON config."""

import copy
import json
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from mi_pipe.core.artifact import Artifact
from mi_pipe.models.bridge_sites import map_hooks, probe_tokens
from mi_pipe.models.device import pick_device
from mi_pipe.models.info import ModelInfo
from mi_pipe.models.model import Model
from mi_pipe.models.module_sites import module_paths, module_sites
from mi_pipe.models.vocabulary import NumberVocabulary

CONFIG_FILE = "model_config.json"
WEIGHTS_FILE = "weights.safetensors"
ARCHITECTURE = "TransformerLensNative"


class TrainedModel(Artifact):
    """A small model made by the stage `train_model`."""

    def native_config(self) -> dict[str, Any]:
        """Return the fields of its TransformerBridgeConfig."""
        return json.loads(self.file(CONFIG_FILE).read_text(encoding="utf-8"))

    def load(self, device: str = "auto") -> Model:
        """Load it in float32."""
        module = native_module(self.native_config())
        module.load_state_dict(load_file(self.file(WEIGHTS_FILE)), strict=True)
        return wrap_native(module.to(pick_device(device)))


def native_module(fields: dict[str, Any]) -> nn.Module:
    """Build a TransformerLens native model with random weights from the seed and sizes in `fields`."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge.sources.native.init import initialize_native_model
    from transformer_lens.model_bridge.sources.native.model import NativeModel

    cfg = TransformerBridgeConfig.from_dict(dict(fields))
    with torch.random.fork_rng(devices=[]):
        module = NativeModel(cfg)
        initialize_native_model(module, cfg)
    return module


def wrap_native(module: Any) -> Model:
    """Make a Model of a native module."""
    probe = copy.deepcopy(module)
    modules = module_sites(probe, probe_tokens(next(probe.parameters()).device), n_axes=2)
    paths = module_paths(probe)
    bridge = _bridge_of(probe)
    hooks = map_hooks(bridge, paths, modules)
    info = ModelInfo.from_bridge_config(bridge.cfg)
    return Model(module, info, hooks, NumberVocabulary(info.d_vocab), _bridge_of)


def _bridge_of(module: Any) -> Any:
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    device = str(next(module.parameters()).device)
    return build_bridge_from_module(module, ARCHITECTURE, tl_config=module.cfg, tokenizer=None, device=device)
