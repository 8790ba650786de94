"""Definition of the RMS norm over channels: forward and hand-written backward in plain PyTorch."""

import torch
from torch import Tensor


def channel_rms_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    normal, _ = _normal(x, eps)
    return (normal * _per_channel(weight, normal) + _per_channel(bias, normal)).to(x.dtype)


def channel_rms_norm_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    normal, scale = _normal(x, eps)
    gradient = grad_output.to(normal.dtype)
    d_normal = gradient * _per_channel(weight, normal)
    d_x = scale * (d_normal - normal * (d_normal * normal).mean(dim=1, keepdim=True))
    others = (0, *range(2, x.dim()))
    d_weight, d_bias = (gradient * normal).sum(dim=others), gradient.sum(dim=others)
    return d_x.to(x.dtype), d_weight.to(weight.dtype), d_bias.to(bias.dtype)


def _normal(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Pixels whose channels have a mean square of 1, and what they were multiplied by, in the computation's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + eps)
    return wide * scale, scale


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(-1, *(1,) * (like.dim() - 2))
