"""A trained SAE as files: a safetensors file of weights, a JSON config, and a probe batch to check both by.

The probe is a few raw activations and the reconstructions that the SAE gave when it was saved. A reader that gets other
reconstructions has read the weights or the inference rule wrongly.
"""

import dataclasses
import hashlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mi_pipe.saes.inference import InferenceRule
from mi_pipe.saes.kernels import Precision
from mi_pipe.saes.sae import SAE
from mi_pipe.saes.sites import Sites

_TOLERANCE = 1e-3
_UNIT_TOLERANCE = 1e-4


def sae_tensors(sae: SAE) -> dict[str, Tensor]:
    """Return the tensors to save."""
    tensors = {"W_enc": sae.W_enc.data, "b_enc": sae.b_enc.data, "W_dec": sae.W_dec.data, "b_dec": sae.b_dec.data}
    skip = {} if sae.W_skip is None else {"W_skip": sae.W_skip.data}
    return {**tensors, **skip, **sae.rule.tensors()}


def sae_config(
    sae: SAE, seed: int | None, probe: dict[str, Tensor], precision: Precision = "float32", **training: Any
) -> dict[str, Any]:
    """Return the JSON beside the tensors; `training` is what else is to be known of how it came about."""
    return {
        "name": sae.name,
        "architecture": sae.architecture,
        "kind": sae.sites.kind,
        "model": sae.model,
        "hook": sae.hook,
        "hook_out": sae.hook_out,
        "sites": {key: list(value) for key, value in dataclasses.asdict(sae.sites).items()},
        "d_in": sae.d_in,
        "d_out": sae.d_out,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "seed": seed,
        "encoder_precision": precision,
        "inference": {"rule": sae.rule.kind, "k": sae.k} if sae.rule.kind == "topk" else {"rule": sae.rule.kind},
        "subtract_b_dec": sae.subtract_b_dec,
        "decoder_rows": "unit" if _has_unit_rows(sae) else "free",
        "training": training,
        "probe_sha256": probe_checksum(probe),
    }


def _has_unit_rows(sae: SAE) -> bool:
    norms = torch.linalg.vector_norm(sae.W_dec, dim=1)
    return bool(((norms - 1).abs() < _UNIT_TOLERANCE).all())


def read_sae(config: dict[str, Any], tensors: dict[str, Tensor]) -> SAE:
    """Make an SAE of its saved config and tensors."""
    named = {name: tensors.get(name) for name in ("threshold", "r_mag", "b_mag")}
    return SAE(
        tensors["W_enc"],
        tensors["b_enc"],
        tensors["W_dec"],
        tensors["b_dec"],
        rule=InferenceRule(config["inference"]["rule"], config["k"], **named),
        architecture=config["architecture"],
        name=config["name"],
        W_skip=tensors.get("W_skip"),
        subtract_b_dec=config["subtract_b_dec"],
        sites=_sites(config),
        model=config.get("model", ""),
    ).eval()


def _sites(config: dict[str, Any]) -> Sites:
    """Return where an SAE reads and writes; version 1 of the stage had SAEs of one hook point only and did not say."""
    if "sites" not in config:
        return Sites.of_sae(config["hook"], config["d_in"])
    return Sites(**{key: tuple(value) for key, value in config["sites"].items()})


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
