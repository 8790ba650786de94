"""Definition of the normalised depthwise-separable convolution: forward and hand-written backward in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from evkernels.reference.depthwise_conv2d import ACTIVATIONS, activation_gradient
from evkernels.reference.separable_conv2d import _widened


def separable_norm_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    output_norm_weight: Tensor,
    output_norm_bias: Tensor,
    residual: Tensor | None = None,
    stride: int = 1,
    padding: int | None = None,
    activation: str = "none",
    output_activation: str = "none",
    groups: int = 0,
    output_groups: int = 0,
    eps: float = 1e-5,
    output_eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    y, _, statistics, output_statistics = separable_norm_conv2d_kernel(
        x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, norm_weight, norm_bias,
        output_norm_weight, output_norm_bias, residual, stride, padding, activation, output_activation, groups,
        output_groups, eps, output_eps,
    )  # fmt: skip
    return y, statistics, output_statistics


def separable_norm_conv2d_kernel(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    output_norm_weight: Tensor,
    output_norm_bias: Tensor,
    residual: Tensor | None = None,
    stride: int = 1,
    padding: int | None = None,
    activation: str = "none",
    output_activation: str = "none",
    groups: int = 0,
    output_groups: int = 0,
    eps: float = 1e-5,
    output_eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output, the pointwise result before its norm, and [mean, variance] of the first and of the second norm."""
    padding = depthwise_weight.shape[-1] // 2 if padding is None else padding
    x_wide, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, *norms = _widened(
        x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, norm_weight, norm_bias,
        output_norm_weight, output_norm_bias,
    )  # fmt: skip
    d = F.conv2d(x_wide, depthwise_weight, depthwise_bias, stride, padding, groups=x.shape[1])
    statistics = _statistics(d, groups)
    a = ACTIVATIONS[activation](_affine(_normal(d, statistics, eps), *norms[:2]))
    pre = F.conv2d(a, pointwise_weight, pointwise_bias)
    output_statistics = _statistics(pre, output_groups)
    y = ACTIVATIONS[output_activation](_affine(_normal(pre, output_statistics, output_eps), *norms[2:]))
    y = y if residual is None else y + residual.to(y.dtype)
    return y.to(x.dtype), pre.to(x.dtype), statistics, output_statistics


def separable_norm_conv2d_backward(
    grad_output: Tensor,
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    output_norm_weight: Tensor,
    output_norm_bias: Tensor,
    pre: Tensor,
    statistics: Tensor,
    output_statistics: Tensor,
    stride: int,
    padding: int,
    activation: str,
    output_activation: str,
    groups: int,
    output_groups: int,
    eps: float,
    output_eps: float,
    need_x: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x (empty unless needed), both weights, both biases (empty where there is none) and the norms'
    weights and biases.
    """
    x_wide, depthwise, pointwise, depthwise_bias_wide, _, weight, bias, output_weight, output_bias = _widened(
        x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, norm_weight, norm_bias,
        output_norm_weight, output_norm_bias,
    )  # fmt: skip
    d = F.conv2d(x_wide, depthwise, depthwise_bias_wide, stride, padding, groups=x.shape[1])
    normal = _normal(d, statistics, eps)
    inner = _affine(normal, weight, bias)
    output_normal = _normal(pre.to(d.dtype), output_statistics, output_eps)
    d_outer = activation_gradient(
        output_activation, _affine(output_normal, output_weight, output_bias), grad_output.to(d.dtype)
    )
    d_pre = _norm_gradient(d_outer, output_normal, output_weight, output_statistics, output_groups, output_eps)
    d_a, d_pointwise, d_pointwise_bias = torch.ops.aten.convolution_backward(
        d_pre, ACTIVATIONS[activation](inner), pointwise, [pointwise.shape[0]], [1, 1], [0, 0], [1, 1], False, [0, 0],
        1, [True, True, True],
    )  # fmt: skip
    d_inner = activation_gradient(activation, inner, d_a)
    d_d = _norm_gradient(d_inner, normal, weight, statistics, groups, eps)
    d_x, d_depthwise, d_depthwise_bias = torch.ops.aten.convolution_backward(
        d_d, x_wide, depthwise, [depthwise.shape[0]], [stride] * 2, [padding] * 2, [1, 1], False, [0, 0],
        depthwise.shape[0], [need_x, True, True],
    )  # fmt: skip
    # Before a batch norm a bias changes nothing.
    d_depthwise_bias, d_pointwise_bias = (
        d if of_groups else torch.zeros_like(d)
        for d, of_groups in ((d_depthwise_bias, groups), (d_pointwise_bias, output_groups))
    )
    pixels = (0, 2, 3)
    gradients = (
        d_x, d_depthwise, d_pointwise, d_depthwise_bias, d_pointwise_bias, (d_inner * normal).sum(pixels),
        d_inner.sum(pixels), (d_outer * output_normal).sum(pixels), d_outer.sum(pixels),
    )  # fmt: skip
    absent = (0,) * (not need_x) + (3,) * (depthwise_bias is None) + (4,) * (pointwise_bias is None)
    return tuple(x.new_empty(0) if k in absent else d.to(x.dtype) for k, d in enumerate(gradients))


def _statistics(d: Tensor, groups: int) -> Tensor:
    """Mean and biased variance [2, 1, C] of batch norm (groups = 0), [2, N, groups] of group norm."""
    if groups == 0:
        variance, mean = torch.var_mean(d, (0, 2, 3), correction=0)
        return torch.stack([mean, variance])[:, None]
    variance, mean = torch.var_mean(d.reshape(d.shape[0], groups, -1), 2, correction=0)
    return torch.stack([mean, variance])


def _per_channel(statistic: Tensor, channels: int) -> Tensor:
    """[rows, columns] as [rows, C, 1, 1]."""
    return statistic.repeat_interleave(channels // statistic.shape[1], 1)[:, :, None, None]


def _normal(d: Tensor, statistics: Tensor, eps: float) -> Tensor:
    mean, variance = (_per_channel(statistic, d.shape[1]) for statistic in statistics)
    return (d - mean) * torch.rsqrt(variance + eps)


def _affine(normal: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return normal * weight[:, None, None] + bias[:, None, None]


def _norm_gradient(
    gradient: Tensor, normal: Tensor, weight: Tensor, statistics: Tensor, groups: int, eps: float
) -> Tensor:
    """The gradient before a norm from that after it."""
    gradient = gradient * weight[:, None, None]

    def average(value: Tensor) -> Tensor:
        return _per_channel(_statistics(value, groups)[0], value.shape[1])

    rstd = torch.rsqrt(_per_channel(statistics[1], normal.shape[1]) + eps)
    return rstd * (gradient - average(gradient) - normal * average(gradient * normal))
