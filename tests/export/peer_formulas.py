"""What the peers compute of the tensors in their folders, written down once more in plain torch from their sources.

SAELens 6.54 (saes/*.py), sparsify 1.3 (sparse_coder.py), dictionary_learning 0.1 (dictionary.py, trainers/*.py).
Each function returns features and output of raw activations.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear


def run_saelens(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    cfg, t = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae_weights.safetensors")
    centred = x - t["b_dec"] * cfg["apply_b_dec_to_input"] if cfg["apply_b_dec_to_input"] else x
    kind = cfg["architecture"]
    if kind == "gated":
        gate = (centred @ t["W_enc"] + t["b_gate"] > 0).float()
        z = gate * (centred @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]).relu()
    else:
        pre = centred @ t["W_enc"] + t["b_enc"]
        if kind == "topk":
            assert not cfg["rescale_acts_by_decoder_norm"]
            z = _top_k(pre, cfg["k"])
        elif "jumprelu" in kind:
            z = pre.relu() * (pre > t["threshold"])
        else:
            z = pre.relu()
    output = z @ t["W_dec"] + t["b_dec"]
    return z, output + x @ t["W_skip"].T if "skip" in kind else output


def run_sparsify(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    cfg, t = json.loads((folder / "cfg.json").read_text()), load_file(folder / "sae.safetensors")
    read = x if cfg["transcode"] else x - t["b_dec"]
    z = _top_k(linear(read, t["encoder.weight"], t["encoder.bias"]).relu(), cfg["k"])
    output = z @ t["W_dec"] + t["b_dec"]
    return z, output + x @ t["W_skip"].T if cfg["skip_connection"] else output


def run_dictionary_learning(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    t = torch.load(folder / "ae.pt", weights_only=True)
    match trainer["dict_class"]:
        case "AutoEncoder":
            z = linear(x - t["bias"], t["encoder.weight"], t["encoder.bias"]).relu()
            return z, linear(z, t["decoder.weight"]) + t["bias"]
        case "AutoEncoderNew":
            z = linear(x, t["encoder.weight"], t["encoder.bias"]).relu()
            return z, linear(z, t["decoder.weight"], t["decoder.bias"])
        case "GatedAutoEncoder":
            pre = linear(x - t["decoder_bias"], t["encoder.weight"])
            z = (pre + t["gate_bias"] > 0) * (t["r_mag"].exp() * pre + t["mag_bias"]).relu()
            return z, linear(z, t["decoder.weight"]) + t["decoder_bias"]
        case "JumpReluAutoEncoder":
            pre = x @ t["W_enc"] + t["b_enc"]
            z = (pre * (pre > t["threshold"])).relu()
            return z, z @ t["W_dec"] + t["b_dec"]
        case "MatryoshkaBatchTopKSAE":
            pre = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
            z = pre * (pre > t["threshold"])
            assert int(t["group_sizes"].sum()) == z.shape[1]
            return z, z @ t["W_dec"] + t["b_dec"]
        case kind:
            pre = linear(x - t["b_dec"], t["encoder.weight"], t["encoder.bias"]).relu()
            assert int(t["k"]) == trainer["k"]
            z = _top_k(pre, trainer["k"]) if kind == "AutoEncoderTopK" else pre * (pre > t["threshold"])
            return z, linear(z, t["decoder.weight"]) + t["b_dec"]


RUN = {"saelens": run_saelens, "sparsify": run_sparsify, "dictionary_learning": run_dictionary_learning}


def _top_k(pre: Tensor, k: int) -> Tensor:
    values, features = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, features, values.relu())
