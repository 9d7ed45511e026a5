"""An SAE as dictionary_learning saves one (dictionary_learning/dictionary.py, trainers/*.py): config.json and ae.pt.

| our SAE | dict_class | tensors |
|---|---|---|
| topk | AutoEncoderTopK | encoder.weight, encoder.bias, decoder.weight, b_dec, k, threshold (-1: none) |
| one θ above 0 for all features | BatchTopKSAE | the same; the threshold is what it uses |
| the same, matryoshka | MatryoshkaBatchTopKSAE | W_enc, b_enc, W_dec, b_dec, k, threshold, group_sizes |
| a θ for each feature | JumpReluAutoEncoder | W_enc, b_enc, W_dec, b_dec, threshold; it reads x, not x - b_dec |
| θ = 0 | AutoEncoder | encoder.weight, encoder.bias, decoder.weight, bias |
| θ = 0, decoder rows not of norm 1 | AutoEncoderNew | encoder.*, decoder.*; it reads x |
| gated | GatedAutoEncoder | encoder.weight, decoder.weight, decoder_bias, r_mag, gate_bias, mag_bias |

AutoEncoder scales its rows to norm 1 when it is loaded, and features with them; AutoEncoderNew leaves them. The weights
are a state dict in PyTorch's own format, which `torch.load(weights_only=True)` reads.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mi_pipe.export.sae_formats.equal_weights import with_subtraction
from mi_pipe.export.sae_formats.origin import Origin
from mi_pipe.export.sae_formats.packed import Form, Packed
from mi_pipe.saes.architectures.matryoshka import prefixes
from mi_pipe.saes.cfg import layer_of
from mi_pipe.saes.sae import SAE

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "ae.pt"
HOLDS = "dictionary_learning holds SAEs of every architecture, of one hook point each"
_TRAINERS = {
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
    "AutoEncoder": "StandardTrainer",
    "AutoEncoderNew": "StandardTrainerAprilUpdate",
    "GatedAutoEncoder": "GatedSAETrainer",
}
"""The trainer that the program itself would have named beside each class; programs that read its folders ask for it."""
_READS_X = ("JumpReluAutoEncoder", "AutoEncoderNew")
_NO_THRESHOLD = -1.0


def holds(form: Form) -> bool:
    """Say whether dictionary_learning has this."""
    return form.is_single and form.kind == "sae" and not form.has_skip


def pack(sae: SAE, origin: Origin) -> Packed:
    """Return config.json and the state dict; raises ConfigError for transcoders and crosscoders."""
    form = Form.of(sae)
    form.check(holds(form), sae.name, HOLDS)
    kind = _dict_class(sae)
    sae = with_subtraction(sae, kind not in _READS_X)
    trainer: dict[str, Any] = {
        "trainer_class": _TRAINERS[kind],
        "dict_class": kind,
        "activation_dim": sae.d_in,
        "dict_size": sae.d_sae,
        "lm_name": origin.model_name(sae),
        "layer": layer_of(sae.hook),
        "submodule_name": sae.hook,
        **({"k": _k(sae)} if sae.k is not None else {}),
    }
    config = {"trainer": trainer, "buffer": {"ctx_len": origin.context_size, "io": "out"}, "mi_pipe": origin.note(sae)}
    return Packed(CONFIG_FILE, config, WEIGHTS_FILE, _state(sae, kind, origin.matryoshka_fractions))


def _dict_class(sae: SAE) -> str:
    if sae.rule.kind == "topk":
        return "AutoEncoderTopK"
    if sae.rule.kind == "gated":
        return "GatedAutoEncoder"
    threshold = sae.threshold
    assert threshold is not None, "a threshold rule has one"
    if not bool(threshold.any()):
        norms = torch.linalg.vector_norm(sae.W_dec, dim=1)
        # The test that AutoEncoder itself makes when it is loaded.
        return "AutoEncoder" if torch.allclose(norms, torch.ones_like(norms)) else "AutoEncoderNew"
    if threshold.ndim or sae.k is None:
        return "JumpReluAutoEncoder"
    return "MatryoshkaBatchTopKSAE" if sae.architecture == "matryoshka" else "BatchTopKSAE"


def _k(sae: SAE) -> int:
    assert sae.k is not None, "asked for only where there is one"
    return min(sae.k, sae.d_sae)


def _state(sae: SAE, kind: str, fractions: Sequence[float]) -> dict[str, Tensor]:
    match kind:
        case "AutoEncoder":
            state = {**_encoder(sae), **_decoder(sae), "bias": sae.b_dec.data}
        case "AutoEncoderNew":
            state = {**_encoder(sae), **_decoder(sae), "decoder.bias": sae.b_dec.data}
        case "GatedAutoEncoder":
            state = _gated(sae)
        case "JumpReluAutoEncoder":
            assert sae.threshold is not None, "a threshold rule has one"
            state = {**_matrices(sae), "threshold": sae.threshold.expand(sae.d_sae).clone()}
        case "MatryoshkaBatchTopKSAE":
            ends = prefixes(sae.d_sae, fractions)
            sizes = [end - start for start, end in zip([0, *ends], ends, strict=False)]
            state = {**_matrices(sae), **_selection(sae), "group_sizes": torch.tensor(sizes, dtype=torch.int64)}
        case _:
            state = {**_encoder(sae), **_decoder(sae), "b_dec": sae.b_dec.data, **_selection(sae)}
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def _encoder(sae: SAE) -> dict[str, Tensor]:
    return {"encoder.weight": sae.W_enc.data.T, "encoder.bias": sae.b_enc.data}


def _decoder(sae: SAE) -> dict[str, Tensor]:
    return {"decoder.weight": sae.W_dec.data.T}


def _matrices(sae: SAE) -> dict[str, Tensor]:
    return {name: getattr(sae, name).data for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


def _gated(sae: SAE) -> dict[str, Tensor]:
    magnitude = sae.rule.tensors()
    return {
        "encoder.weight": sae.W_enc.data.T,
        **_decoder(sae),
        "decoder_bias": sae.b_dec.data,
        "r_mag": magnitude["r_mag"],
        "gate_bias": sae.b_enc.data,
        "mag_bias": magnitude["b_mag"],
    }


def _selection(sae: SAE) -> dict[str, Tensor]:
    threshold = torch.tensor(_NO_THRESHOLD) if sae.threshold is None else sae.threshold.clone()
    return {"k": torch.tensor(_k(sae), dtype=torch.int32), "threshold": threshold}
