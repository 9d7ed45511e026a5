"""A trained SAE as files: a safetensors file of weights, a JSON config, and a probe batch to check both by.

The probe is a few raw activations and the reconstructions that the SAE gave when it was saved. A reader that gets other
reconstructions has read the weights or the inference rule wrongly.
"""

import hashlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_pipe.saes.architecture import InferenceRule
from mi_pipe.saes.kernels import Precision
from mi_pipe.saes.sae import SAE

_TOLERANCE = 1e-3


def sae_tensors(sae: SAE) -> dict[str, Tensor]:
    """Return the tensors to save."""
    tensors = {"W_enc": sae.W_enc.data, "b_enc": sae.b_enc.data, "W_dec": sae.W_dec.data, "b_dec": sae.b_dec.data}
    return tensors if sae.threshold is None else {**tensors, "threshold": sae.threshold}


def sae_config(sae: SAE, seed: int, probe: dict[str, Tensor], precision: Precision = "float32") -> dict[str, Any]:
    """Return the JSON beside the tensors."""
    return {
        "name": sae.name,
        "architecture": sae.architecture,
        "hook": sae.hook,
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "seed": seed,
        "encoder_precision": precision,
        "inference": {"rule": sae.rule, "k": sae.k} if sae.rule == "topk" else {"rule": sae.rule},
        "subtract_b_dec": True,
        "decoder_rows": "unit",
        "probe_sha256": probe_checksum(probe),
    }


def read_sae(config: dict[str, Any], tensors: dict[str, Tensor]) -> SAE:
    """Make an SAE of its saved config and tensors."""
    rule = InferenceRule(config["inference"]["rule"], config["k"], tensors.get("threshold"))
    weights = {name: tensors[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    return SAE(
        **weights, rule=rule, hook=config["hook"], architecture=config["architecture"], name=config["name"]
    ).eval()


@torch.no_grad()
def make_probe(sae: SAE, x: Float[Tensor, "batch d_in"]) -> dict[str, Tensor]:
    """Return the probe of an SAE on some raw activations."""
    return {"input": x, "output": sae(x)}


def probe_checksum(probe: dict[str, Tensor]) -> str:
    """Return the SHA-256 of the probe's float32 bytes, input then output."""
    digest = hashlib.sha256()
    for part in ("input", "output"):
        digest.update(probe[part].to(torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def probe_error(sae: SAE, probe: dict[str, Tensor]) -> float:
    """Return ‖SAE(input) - output‖ / ‖output - b_dec‖ over the probe."""
    difference = sae(probe["input"].to(sae.device)).cpu() - probe["output"]
    size = torch.linalg.vector_norm(probe["output"] - sae.b_dec.cpu())
    return float(torch.linalg.vector_norm(difference) / size.clamp_min(torch.finfo(torch.float32).tiny))


def probe_agrees(sae: SAE, probe: dict[str, Tensor]) -> bool:
    """Say whether an SAE gives its probe's outputs, to within float32 arithmetic on another machine."""
    return probe_error(sae, probe) < _TOLERANCE
