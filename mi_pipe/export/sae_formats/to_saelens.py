"""An SAE as SAELens 6 saves one for inference (sae_lens/saes/*.py, 6.54): cfg.json and sae_weights.safetensors.

| our rule | an SAE | a transcoder | one with a skip connection |
|---|---|---|---|
| topk | topk | | |
| threshold, θ = 0 | standard | transcoder | skip_transcoder |
| threshold | jumprelu | jumprelu_transcoder | jumprelu_skip_transcoder |
| gated | gated | | |

BatchTopK and Matryoshka are threshold rules, as SAELens saves its own. SAELens applies hooks at `hook_z` to values with
a head axis and flattens them itself (`reshape_activations`); the weights are for flat values, as ours.
"""

from typing import Any

import torch
from torch import Tensor

from mi_pipe.export.sae_formats.equal_weights import with_subtraction
from mi_pipe.export.sae_formats.origin import Origin
from mi_pipe.export.sae_formats.packed import Form, Packed
from mi_pipe.saes.sae import SAE

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
VERSION = "6.54.12"
"""The SAELens whose format is written. Without a version of at least 6.0 it takes a config for an older format."""
MATRYOSHKA = "matryoshka_batchtopk"
"""What SAELens calls the architecture that is matryoshka here."""
HOLDS = "SAELens holds SAEs, and transcoders whose rule is a threshold, of one hook point each"


def holds(form: Form) -> bool:
    """Say whether SAELens has an architecture for this."""
    if form.kind == "sae":
        return form.is_single and not form.has_skip
    return form.is_single and form.rule == "threshold"


def pack(sae: SAE, origin: Origin) -> Packed:
    """Return cfg.json and weights; raises ConfigError for what SAELens has no architecture for."""
    form = Form.of(sae)
    form.check(holds(form), sae.name, HOLDS)
    is_transcoder = form.kind == "transcoder"
    if is_transcoder:
        sae = with_subtraction(sae, False)
    config: dict[str, Any] = {
        "architecture": _architecture(sae, is_transcoder),
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.subtract_b_dec,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if sae.hook.endswith("hook_z") and not is_transcoder else "none",
        "metadata": _metadata(sae, origin, is_transcoder),
    }
    if is_transcoder:
        config["d_out"] = sae.d_out
    if form.rule == "topk":
        assert sae.k is not None, "a topk rule has k"
        config |= {"k": min(sae.k, sae.d_sae), "rescale_acts_by_decoder_norm": False}
    return Packed(CONFIG_FILE, config, WEIGHTS_FILE, _tensors(sae))


def _architecture(sae: SAE, is_transcoder: bool) -> str:
    if sae.rule.kind != "threshold":
        return sae.rule.kind
    has_threshold = _threshold(sae) is not None
    if not is_transcoder:
        return "jumprelu" if has_threshold else "standard"
    return f"{'jumprelu_' if has_threshold else ''}{'skip_' if sae.W_skip is not None else ''}transcoder"


def _threshold(sae: SAE) -> Tensor | None:
    """Return θ for each feature; None if it is 0 everywhere (ReLU)."""
    if sae.threshold is None or not bool(sae.threshold.any()):
        return None
    return sae.threshold.expand(sae.d_sae).clone()


def _tensors(sae: SAE) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {"W_enc": sae.W_enc.data, "W_dec": sae.W_dec.data, "b_dec": sae.b_dec.data}
    if sae.rule.kind == "gated":
        tensors |= {"b_gate": sae.b_enc.data, **sae.rule.tensors()}
    else:
        tensors["b_enc"] = sae.b_enc.data
    threshold = _threshold(sae)
    if threshold is not None:
        tensors["threshold"] = threshold
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.data
    return {name: value.to(torch.float32) for name, value in tensors.items()}


def _metadata(sae: SAE, origin: Origin, is_transcoder: bool) -> dict[str, Any]:
    """Return SAELens' free notes: what it is attached to, and where it comes from."""
    return {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": origin.model_name(sae),
        "hook_name": sae.hook,
        **({"hook_name_out": sae.hook_out} if is_transcoder else {}),
        "hook_head_index": None,
        "context_size": origin.context_size,
        "prepend_bos": origin.prepend_bos,
        "training_architecture": MATRYOSHKA if sae.architecture == "matryoshka" else sae.architecture,
        "training_architecture_details": {} if sae.k is None else {"k": sae.k},
        "mi_pipe": origin.note(sae),
    }
