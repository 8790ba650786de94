"""Definition of the depthwise-separable convolution: forward and hand-written backward in plain PyTorch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from evkernels.reference.depthwise_conv2d import ACTIVATIONS, activation_gradient


def separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: int = 1,
    padding: int | None = None,
    activation: str = "none",
    output_activation: str = "none",
) -> Tensor:
    padding = depthwise_weight.shape[-1] // 2 if padding is None else padding
    weights = (depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias)
    return separable_conv2d_training(x, *weights, stride, padding, activation, output_activation)[0]


def separable_conv2d_training(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    stride: int,
    padding: int,
    activation: str,
    output_activation: str,
) -> tuple[Tensor, Tensor]:
    """The output, and the pointwise result before its activation."""
    wide = _widened(x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias)
    _, _, pre = _pre_activations(*wide, stride, padding, activation)
    y = ACTIVATIONS[output_activation](pre)
    return (y.clone() if y is pre else y).to(x.dtype), pre.to(x.dtype)


def separable_conv2d_backward(
    grad_output: Tensor,
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    stride: int,
    padding: int,
    activation: str,
    output_activation: str,
    output_mask: Sequence[bool] = (True,) * 5,
    pre_output: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of the first five arguments of the forward; those that `output_mask` leaves out are empty tensors.

    `pre_output` is the pointwise result before its activation, if the forward has kept it.
    """
    wide = _widened(x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias)
    pre, a, y = _pre_activations(*wide, stride, padding, activation)
    y = y if pre_output is None else pre_output.to(y.dtype)
    d_y = activation_gradient(output_activation, y, grad_output.to(y.dtype))
    d_a, d_pointwise_weight, d_pointwise_bias = torch.ops.aten.convolution_backward(
        d_y, a, wide[2], [wide[2].shape[0]], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, True]
    )
    d_pre = activation_gradient(activation, pre, d_a)
    d_x, d_depthwise_weight, d_depthwise_bias = torch.ops.aten.convolution_backward(
        d_pre, wide[0], wide[1], [wide[1].shape[0]], [stride] * 2, [padding] * 2, [1, 1], False, [0, 0],
        wide[1].shape[0], [True, True, True],
    )  # fmt: skip
    gradients = (d_x, d_depthwise_weight, d_pointwise_weight, d_depthwise_bias, d_pointwise_bias)
    return tuple(d.to(x.dtype) if wanted else x.new_empty(0) for d, wanted in zip(gradients, output_mask, strict=True))


def _widened(x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """Everything in the dtype of the computation: at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return [None if value is None else value.to(dtype) for value in (x, *parameters)]


def _pre_activations(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    stride: int,
    padding: int,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The depthwise result before and after its activation, and the pointwise result before its own."""
    pre = F.conv2d(x, depthwise_weight, depthwise_bias, stride, padding, groups=x.shape[1])
    a = ACTIVATIONS[activation](pre)
    return pre, a, F.conv2d(a, pointwise_weight, pointwise_bias)
