"""Definition of an MLP's residual branch: forward and hand-written backward in plain PyTorch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from evkernels.reference.time_basis import widened


def residual_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    scale: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    wide, *parameters, last, scales = widened(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, scale)
    *_, before = _layers(wide, *parameters[:4], eps)
    return (wide + scales * F.linear(F.gelu(before), parameters[4], last)).to(x.dtype)


def residual_mlp_backward(
    grad_output: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, ...]:
    """Gradients of all tensors in their order."""
    grad, wide, *parameters = widened(grad_output, x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, scale)
    weights, _, first, _, second, last, scales = parameters
    grad, wide = (value.flatten(0, -2) for value in (grad, wide))
    normal, deviation, rows, before = _layers(wide, *parameters[:4], eps)
    hidden = F.gelu(before)
    d_branch = grad * scales
    share = 0.5 * (1 + torch.erf(before * 0.5**0.5))
    density = torch.exp(-0.5 * before.square()) / math.sqrt(2 * math.pi)
    d_before = d_branch @ second * (share + before * density)
    d_rows = d_before @ first
    d_normal = d_rows * weights
    along = (d_normal * normal).mean(dim=-1, keepdim=True)
    d_x = grad + (d_normal - d_normal.mean(dim=-1, keepdim=True) - normal * along) / deviation
    gradients = (
        d_x.view(x.shape),
        *((d_rows * normal).sum(dim=0), d_rows.sum(dim=0)),
        *(d_before.T @ rows, d_before.sum(dim=0)),
        *(d_branch.T @ hidden, d_branch.sum(dim=0)),
        (grad * F.linear(hidden, second, last)).sum(dim=0),
    )
    return tuple(gradient.to(x.dtype) for gradient in gradients)


def _layers(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight1: Tensor, bias1: Tensor, eps: float):
    """Rows of mean 0 and variance 1, what they were divided by, what the MLP sees, its hidden layer before GELU."""
    centred = x - x.mean(dim=-1, keepdim=True)
    deviation = (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    normal = centred / deviation
    rows = normal * norm_weight + norm_bias
    return normal, deviation, rows, F.linear(rows, weight1, bias1)
