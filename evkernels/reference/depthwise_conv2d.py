"""Definition of the depthwise convolution: forward and hand-written backward in plain PyTorch."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {
    "none": lambda pre: pre,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda pre: F.gelu(pre, approximate="tanh"),
    "sigmoid": torch.sigmoid,
}


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    activation: str,
    dilation: int = 1,
) -> Tensor:
    x_wide, weight_wide, bias_wide = _widened(x, weight, bias)
    pre = F.conv2d(x_wide, weight_wide, bias_wide, stride, padding, dilation, groups=x.shape[1])
    return ACTIVATIONS[activation](pre).to(x.dtype)


def depthwise_conv2d_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    activation: str,
    dilation: int,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x_wide, weight_wide, bias_wide = _widened(x, weight, bias)
    d_pre = grad_output.to(x_wide.dtype)
    if activation != "none":
        pre = F.conv2d(x_wide, weight_wide, bias_wide, stride, padding, dilation, groups=x.shape[1])
        d_pre = activation_gradient(activation, pre, d_pre)
    grad_x, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        d_pre, x_wide, weight_wide, [x.shape[1]], [stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0],
        x.shape[1], [need_x, need_weight, need_bias],
    )  # fmt: skip
    nothing = x.new_empty(0)
    return (
        grad_x.to(x.dtype) if need_x else nothing,
        grad_weight.to(x.dtype) if need_weight else nothing.clone(),
        grad_bias.to(x.dtype) if need_bias else nothing.clone(),
    )


def activation_gradient(activation: str, pre: Tensor, d_output: Tensor) -> Tensor:
    """The gradient at the pre-activation."""
    if activation == "relu":
        return d_output.masked_fill(pre <= 0, 0)
    if activation == "silu":
        s = pre.sigmoid()
        return d_output * (s * (1 + pre * (1 - s)))
    if activation == "gelu":
        density = (-0.5 * pre * pre).exp() / math.sqrt(2 * math.pi)
        return d_output * (torch.special.ndtr(pre) + pre * density)
    if activation == "gelu_tanh":
        u = 2 * math.sqrt(2 / math.pi) * (pre + 0.044715 * pre**3)
        # The logistic's derivative is zero from |pre| = 10 on, its factor must not become infinite.
        near = pre.clamp(-100, 100)
        slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * near.square())
        return d_output * (u.sigmoid() + near * slope * (u.sigmoid() * (-u).sigmoid()))
    if activation == "sigmoid":
        return d_output * (pre.sigmoid() * (-pre).sigmoid())
    return d_output


def _widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands in at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
