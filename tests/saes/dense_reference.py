"""The same mathematics written plainly with autograd and dense matrices: what the sparse code is held against.

Parameters are a dict of leaves; `u` is the encoder's input. Each function returns the whole loss of a batch.
"""

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


class Dense:
    """One batch: the encoder's input, pre-activations, and reconstructions."""

    def __init__(self, params: dict[str, Tensor], x: Tensor, target: Tensor, subtract: bool) -> None:
        self.params, self.x, self.target = params, x, target
        self.u = x - params["b_dec"] if subtract else x
        self.pre = self.u @ params["W_enc"].T + params["b_enc"]

    def decode(self, z: Tensor, n_features: int | None = None) -> Tensor:
        W_dec = self.params["W_dec"][:n_features]
        out = z[:, :n_features] @ W_dec + self.params["b_dec"]
        return out + self.x @ self.params["W_skip"].T if "W_skip" in self.params else out

    def error(self, z: Tensor, n_features: int | None = None) -> Tensor:
        return self.target - self.decode(z, n_features)

    def mse(self, z: Tensor, n_features: int | None = None) -> Tensor:
        return self.error(z, n_features).square().sum() / self.target.numel()

    def auxk(self, z: Tensor, dead: Tensor, coefficient: float) -> Tensor:
        if not len(dead) or not coefficient:
            return torch.zeros((), dtype=z.dtype)
        error = self.error(z).detach()
        k_aux = min(self.target.shape[1] // 2 or 1, len(dead))
        pre_dead = self.pre[:, dead]
        z_dead = torch.where(topk_mask(pre_dead.detach(), k_aux), pre_dead, 0.0).relu()
        missing = error - z_dead @ self.params["W_dec"][dead]
        variance = (error - error.mean(0)).square().sum()
        return coefficient * missing.square().sum() / variance if variance > 0 else torch.zeros((), dtype=z.dtype)


def topk_loss(dense: Dense, k: int) -> tuple[Tensor, Tensor]:
    z = torch.where(topk_mask(dense.pre.detach(), k), dense.pre, 0.0).relu()
    return dense.mse(z), z


def batchtopk_loss(dense: Dense, k: int) -> tuple[Tensor, Tensor]:
    z = torch.where(batch_topk_mask(dense.pre.detach(), k), dense.pre, 0.0).relu()
    return dense.mse(z), z


def matryoshka_loss(dense: Dense, k: int, prefixes: list[int]) -> tuple[Tensor, Tensor]:
    _, z = batchtopk_loss(dense, k)
    return torch.stack([dense.mse(z, m) for m in prefixes]).mean(), z


def standard_loss(dense: Dense, coefficient: float, hook_ends: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    z = dense.pre.relu()
    parts = dense.params["W_dec"].tensor_split(hook_ends, dim=1)
    penalty = (z * sum(part.norm(dim=1) for part in parts)).sum()
    return dense.mse(z) + coefficient * penalty / dense.target.numel(), z


def p_anneal_loss(dense: Dense, coefficient: float, p: float) -> tuple[Tensor, Tensor]:
    z = dense.pre.relu()
    penalty = torch.where(z > 0, (z + 0.1) ** p - 0.1**p, 0.0).sum()
    return dense.mse(z) + coefficient * penalty / dense.target.numel(), z


def gated_loss(dense: Dense, coefficient: float) -> tuple[Tensor, Tensor]:
    params, n = dense.params, dense.target.numel()
    h = dense.u @ params["W_enc"].T
    gate = h + params["b_enc"]
    magnitude = (params["r_mag"].exp() * h + params["b_mag"]).relu()
    z = torch.where(gate > 0, magnitude, 0.0)
    frozen = gate.relu() @ params["W_dec"].detach() + params["b_dec"].detach()
    if "W_skip" in params:
        frozen = frozen + dense.x @ params["W_skip"].detach().T
    through_gate = (dense.target - frozen).square().sum() / n
    return dense.mse(z) + coefficient * gate.relu().sum() / n + through_gate, z


class Jump(torch.autograd.Function):
    """z = pre [pre > θ] with the paper's pseudo-derivative by θ; values at or below 0 belong to no window."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        window = ((pre - threshold).abs() < ctx.bandwidth / 2) & (pre > 0)
        return grad * (pre > threshold), (-threshold / ctx.bandwidth * window * grad).sum(0), None


class Count(torch.autograd.Function):
    """1[pre > θ] with the paper's pseudo-derivative by θ."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        window = ((pre - threshold).abs() < ctx.bandwidth / 2) & (pre > 0)
        return None, (-1 / ctx.bandwidth * window * grad).sum(0), None


def jumprelu_loss(dense: Dense, coefficient: float, form: str, bandwidth: float, target: float):
    threshold, n = dense.params["threshold"], dense.target.numel()
    z = Jump.apply(dense.pre, threshold, bandwidth)
    if form == "tanh":
        penalty = torch.tanh(4 * z).sum() / n
    else:
        active = Count.apply(dense.pre, threshold, bandwidth).sum()
        penalty = active / n if form == "step" else (active / len(dense.x) / target - 1) ** 2
    return dense.mse(z) + coefficient * penalty, z


def revival_loss(dense: Dense, dead: Tensor, coefficient: float) -> Tensor:
    """JumpReLU's thresholds of dead features, which have to come down; part of what AuxK's coefficient switches on."""
    threshold = dense.params.get("threshold")
    if threshold is None or not coefficient:
        return torch.zeros((), dtype=dense.x.dtype)
    return 2 * threshold[dead].sum() / len(threshold)
