"""Training and gradient of `separable_conv2d`, composed of registered ops and a library's matrix products.

They serve the backends that have no kernel of their own for them: on a GPU a library's products are the fastest there
are, and the depthwise parts are ours. The depthwise result is computed again, which costs less than keeping it, and so
is the pointwise one where an activation follows it and the forward has not kept it.
"""

import torch
from torch import Tensor

from evkernels.ops.registration import common_layout
from evkernels.reference.depthwise_conv2d import ACTIVATIONS

_GRADIENTS = {
    "relu": lambda d_y, y: torch.ops.aten.threshold_backward(d_y, y, 0),
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda d_y, y: torch.ops.aten.gelu_backward(d_y, y, approximate="tanh"),
    "sigmoid": lambda d_y, y: torch.ops.aten.sigmoid_backward(d_y, y.sigmoid()),
}


def composed_training(*arguments) -> tuple[Tensor, Tensor]:
    """A kernel of `separable_conv2d_training` for any device, see `reference.separable_conv2d_training`."""
    *others, output_activation = arguments
    pre = torch.ops.evkernels.separable_conv2d(*others, "none")
    y = ACTIVATIONS[output_activation](pre)
    return y.clone() if y is pre else y, pre


def composed_backward(
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
    output_mask: list[bool],
    pre: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """A kernel of `separable_conv2d_backward` for any device, see `reference.separable_conv2d_backward`."""
    need_x, need_depthwise_weight, need_pointwise_weight, need_depthwise_bias, need_pointwise_bias = output_mask
    need_depthwise = [need_x, need_depthwise_weight, need_depthwise_bias]
    layout = common_layout(x)
    x = x.contiguous(memory_format=layout)
    depthwise = (x, depthwise_weight, depthwise_bias, stride, padding, activation, 1)
    d_y = grad_output.contiguous(memory_format=layout)
    if output_activation != "none":
        if pre is None:
            pre = torch.ops.evkernels.separable_conv2d(
                x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, stride, padding, activation,
                "none",
            )  # fmt: skip
        d_y = _GRADIENTS[output_activation](d_y, pre)
    d_a, d_pointwise_weight, d_pointwise_bias = torch.ops.aten.convolution_backward(
        d_y, torch.ops.evkernels.depthwise_conv2d(*depthwise), pointwise_weight, [pointwise_weight.shape[0]],
        [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [any(need_depthwise), need_pointwise_weight, need_pointwise_bias],
    )  # fmt: skip
    d_x, d_depthwise_weight, d_depthwise_bias = (x.new_empty(0) for _ in range(3))
    if any(need_depthwise):
        d_x, d_depthwise_weight, d_depthwise_bias = torch.ops.evkernels.depthwise_conv2d_backward(
            d_a.contiguous(memory_format=layout), *depthwise, *need_depthwise
        )
    return (
        d_x,
        d_depthwise_weight,
        d_pointwise_weight.contiguous() if need_pointwise_weight else x.new_empty(0),
        d_depthwise_bias,
        d_pointwise_bias if need_pointwise_bias else x.new_empty(0),
    )
