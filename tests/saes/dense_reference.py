"""The same mathematics written plainly with autograd and dense matrices: what the sparse code is held against."""

import torch
from torch import Tensor


def topk_mask(pre: Tensor, k: int) -> Tensor:
    mask = torch.zeros_like(pre, dtype=torch.bool)
    for row in range(pre.shape[0]):
        best = sorted(range(pre.shape[1]), key=lambda j: -float(pre[row, j]))[:k]
        mask[row, best] = True
    return mask


def batch_topk_mask(pre: Tensor, k: int) -> Tensor:
    n = k * pre.shape[0]
    edge = pre.flatten().sort(descending=True).values[n - 1]
    return pre >= edge


def dense_loss(params: dict[str, Tensor], x: Tensor, mask_of, dead: Tensor, coefficient: float) -> Tensor:
    """The loss of a whole step, from autograd parameters."""
    pre = (x - params["b_dec"]) @ params["W_enc"].T + params["b_enc"]
    z = torch.where(mask_of(pre.detach()), pre, 0.0).relu()
    reconstruction = z @ params["W_dec"] + params["b_dec"]
    loss = (x - reconstruction).square().sum() / x.numel()
    if len(dead) and coefficient:
        error = (x - reconstruction).detach()
        k_aux = min(x.shape[1] // 2, len(dead))
        pre_dead = pre[:, dead]
        z_dead = torch.where(topk_mask(pre_dead.detach(), k_aux), pre_dead, 0.0).relu()
        missing = error - z_dead @ params["W_dec"][dead]
        variance = (error - error.mean(0)).square().sum()
        loss = loss + coefficient * missing.square().sum() / variance
    return loss
