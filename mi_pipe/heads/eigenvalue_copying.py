"""Copying by eigenvalues: whether a head's OV circuit makes what it reads more likely, from the weights alone.

Score = Re(sum of eigenvalues) / sum of their absolute values, 1 if all are positive, -1 if all are negative. (Elhage
et al. 2021, "Eigenvalue analysis of OV circuits"; TransformerLens' Main Demo.) Two circuits:

- `ov`: W_V W_O, from the residual stream to the residual stream;
- `full_ov`: W_E W_V W_O W_U, from tokens to logits.

The nonzero eigenvalues of a product X Y are those of Y X, so both are eigenvalues of a d_head x d_head matrix:
W_O W_V, and W_O (W_U W_E) W_V, in which W_U W_E is d_model x d_model and the same for all heads.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from mi_pipe.features.logit_effects import fold_norm
from mi_pipe.heads.final_readout import seen_through
from mi_pipe.models.head_weights import HeadWeights
from mi_pipe.models.model import Model


@torch.no_grad()
def ov_eigenvalue_copying(weights: HeadWeights) -> Float[Tensor, " head"]:
    """Return the score of W_V W_O of each head, float64."""
    return copying_of_eigenvalues(weights.W_O.double() @ weights.to_heads(weights.W_V).double())


@torch.no_grad()
def full_ov_eigenvalue_copying(
    weights: HeadWeights, token_map: Float[Tensor, "d_model d_model"]
) -> Float[Tensor, " head"]:
    """Return the score of W_E W_V W_O W_U of each head, float64; `token_map` is W_U W_E."""
    inner = weights.W_O.double() @ token_map.double()
    return copying_of_eigenvalues(inner @ weights.to_heads(weights.W_V).double())


@torch.no_grad()
def token_map(model: Model, fold_norm_weights: bool = False) -> Float[Tensor, "d_model d_model"]:
    """Return W_U W_E, summed over the vocabulary; W_U with the final norm's weights if these are folded."""
    embedding = model.submodule(model.hooks["embed.hook_out"].module_path or "").weight
    assert isinstance(embedding, Tensor), "an embedding has a weight (d_vocab, d_model)"
    n_tokens = min(len(embedding), model.W_U.shape[1])
    columns = model.W_U[:, :n_tokens].float().T
    if fold_norm_weights:
        columns = seen_through(fold_norm(model.final_norm, model.info.d_model, model.W_U.new_empty(0)), columns)
    return columns.T @ embedding[:n_tokens].float()


def copying_of_eigenvalues(matrix: Float[Tensor, "head d_head d_head"]) -> Float[Tensor, " head"]:
    """Return Re(sum of eigenvalues) / sum of absolute eigenvalues of each matrix."""
    eigenvalues = torch.linalg.eigvals(matrix)
    return eigenvalues.real.sum(-1) / eigenvalues.abs().sum(-1)
