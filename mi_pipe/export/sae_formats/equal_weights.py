"""Other weights of the same SAE: programs differ in what they subtract from the input and in how features are scaled.

Products are taken in float64 and rounded once, so that outputs differ by float32 rounding alone.
"""

from dataclasses import replace

import torch
from torch import Tensor

from mi_pipe.saes.sae import SAE

_TINY = torch.finfo(torch.float64).tiny


def with_subtraction(sae: SAE, subtract_b_dec: bool) -> SAE:
    """Return the same function with an encoder that reads x - b_dec, or x.

    (x - b_dec) W_enc + b_enc = x W_enc + (b_enc - b_dec W_enc), and gated magnitudes likewise with exp(r) W_enc. Raises
    ValueError where b_dec is not of the input's width.
    """
    if sae.subtract_b_dec == subtract_b_dec:
        return sae
    sign = 1.0 if subtract_b_dec else -1.0
    shift = sign * (sae.b_dec.double() @ sae.W_enc.double())
    rule = sae.rule
    if rule.kind == "gated":
        magnitude = {name: value.double() for name, value in rule.tensors().items()}
        rule = replace(rule, b_mag=_rounded(magnitude["b_mag"] + magnitude["r_mag"].exp() * shift, sae))
    return SAE(
        sae.W_enc.data,
        _rounded(sae.b_enc.double() + shift, sae),
        sae.W_dec.data,
        sae.b_dec.data,
        rule=rule,
        architecture=sae.architecture,
        name=sae.name,
        W_skip=None if sae.W_skip is None else sae.W_skip.data,
        subtract_b_dec=subtract_b_dec,
        sites=sae.sites,
        model=sae.model,
    )


def unit_decoder_rows(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: N803
    """Return weights whose features are z_j ‖W_dec,j‖ and whose decoder rows have norm 1: the same reconstruction.

    Rows that are 0 stay 0, and so do their features.
    """
    norms = torch.linalg.vector_norm(W_dec.double(), dim=1)
    made = W_enc.double() * norms, b_enc.double() * norms, W_dec.double() / norms.clamp_min(_TINY)[:, None]
    return made[0].to(W_enc.dtype), made[1].to(b_enc.dtype), made[2].to(W_dec.dtype)


def _rounded(value: Tensor, sae: SAE) -> Tensor:
    return value.to(sae.dtype)
