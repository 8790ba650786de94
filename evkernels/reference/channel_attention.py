"""Definition of channel attention: forward and hand-written backward in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from evkernels.reference.depthwise_conv2d import activation_gradient


def channel_attention(x: Tensor, reduce_weight: Tensor, expand_weight: Tensor) -> tuple[Tensor, Tensor]:
    """The result and the means [N, C] that it was computed from."""
    wide, reduce_weight, expand_weight = _widened(x, reduce_weight, expand_weight)
    means = wide.mean((2, 3))
    _, _, scale = _network(means, reduce_weight, expand_weight)
    return (wide * scale[:, :, None, None]).to(x.dtype), means


def channel_attention_backward(
    grad_output: Tensor, x: Tensor, reduce_weight: Tensor, expand_weight: Tensor, means: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide, reduce_weight, expand_weight, gradient = _widened(x, reduce_weight, expand_weight, grad_output)
    inner, activated, scale = _network(means, reduce_weight, expand_weight)
    d_logit = (gradient * wide).sum((2, 3)) * scale * (1 - scale)
    d_inner = activation_gradient("gelu", inner, d_logit @ expand_weight[:, :, 0, 0])
    d_means = d_inner @ reduce_weight[:, :, 0, 0]
    d_x = gradient * scale[:, :, None, None] + d_means[:, :, None, None] / (x.shape[2] * x.shape[3])
    d_reduce, d_expand = d_inner.T @ means, d_logit.T @ activated
    return tuple(d.to(x.dtype) for d in (d_x, d_reduce[:, :, None, None], d_expand[:, :, None, None]))


def _widened(*values: Tensor) -> list[Tensor]:
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    return [value.to(dtype) for value in values]


def _network(means: Tensor, reduce_weight: Tensor, expand_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Its values in the middle, before and behind the GELU, and the scale."""
    inner = means @ reduce_weight[:, :, 0, 0].T
    activated = F.gelu(inner)
    return inner, activated, (activated @ expand_weight[:, :, 0, 0].T).sigmoid()
