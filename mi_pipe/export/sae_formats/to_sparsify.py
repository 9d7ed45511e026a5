"""An SAE as EleutherAI's sparsify saves one (sparsify/sparse_coder.py, 1.3): cfg.json and sae.safetensors.

Encoder rows are features: encoder.weight is W_encᵀ. `transcode` says that the encoder reads x, not x - b_dec.
`sparsify.SparseCoder.load_many(folder, local=True)` reads a whole export; keys that sparsify does not know are dropped
by it.
"""

import torch
from torch import Tensor

from mi_pipe.export.sae_formats.origin import Origin
from mi_pipe.export.sae_formats.packed import Form, Packed
from mi_pipe.saes.sae import SAE

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae.safetensors"
HOLDS = "sparsify holds TopK SAEs, and TopK transcoders of one hook point each whose input and output are equally wide"


def holds(form: Form) -> bool:
    """Say whether sparsify has this."""
    return form.is_single and form.rule == "topk" and form.sites.input_widths == form.sites.output_widths


def pack(sae: SAE, origin: Origin) -> Packed:
    """Return cfg.json and weights; raises ConfigError for what is no TopK SAE or square TopK transcoder."""
    form = Form.of(sae)
    form.check(holds(form), sae.name, HOLDS)
    assert sae.k is not None, "a topk rule has k"
    norms = torch.linalg.vector_norm(sae.W_dec, dim=1)
    config = {
        "activation": "topk",
        "d_in": sae.d_in,
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "k": min(sae.k, sae.d_sae),
        "multi_topk": False,
        "normalize_decoder": bool(torch.allclose(norms, torch.ones_like(norms), atol=1e-4)),
        "num_latents": sae.d_sae,
        "skip_connection": sae.W_skip is not None,
        "transcode": not sae.subtract_b_dec,
        "model": origin.model_name(sae),
        "hookpoint": sae.sites.label,
        "mi_pipe": origin.note(sae),
    }
    tensors: dict[str, Tensor] = {
        "encoder.weight": sae.W_enc.data.T,
        "encoder.bias": sae.b_enc.data,
        "W_dec": sae.W_dec.data,
        "b_dec": sae.b_dec.data,
    }
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.data
    return Packed(CONFIG_FILE, config, WEIGHTS_FILE, {name: value.to(torch.float32) for name, value in tensors.items()})
