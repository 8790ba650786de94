"""Depthwise-separable convolution in Triton: one program takes a tile of OUTPUTS x PIXELS of one sample.

It goes through the channels in blocks: the depthwise result of a block is computed in registers, activated, and
multiplied into the tile by the matrix units, so that it never reaches memory. 16-bit data enter the product in their
own dtype, as in PyTorch; float64 has no such product and is summed plainly. The gradient is composed of other ops, see
evkernels/ops/separable_conv2d_composed.py.
"""

import torch
import triton
import triton.language as tl
from evkernels.triton_kernels.depthwise_conv2d import _offsets, _pre_activation, _tile
from evkernels.triton_kernels.launch import arithmetic_dtype, factor_dtype, in_layout, launch
from evkernels.triton_kernels.math import activate
from torch import Tensor

from evkernels.ops.depthwise_conv2d import output_shape
from evkernels.ops.registration import common_layout


@triton.jit
def separable_conv2d_forward_kernel(
    x_ptr, depthwise_weight_ptr, pointwise_weight_ptr, depthwise_bias_ptr, pointwise_bias_ptr, y_ptr,
    C, O, H, W, out_height, out_width, padding,
    K: tl.constexpr, S: tl.constexpr, ACTIVATION: tl.constexpr, OUTPUT_ACTIVATION: tl.constexpr, DTYPE: tl.constexpr,
    INTERLEAVED: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, OUTPUTS: tl.constexpr,
    FACTOR: tl.constexpr,
):  # fmt: skip
    sample, _, row, column, output = _tile(O, out_height, out_width, PIXELS, OUTPUTS)
    total = tl.zeros((OUTPUTS, PIXELS), DTYPE)
    for first in range(0, C, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        a = _pre_activation(
            x_ptr, depthwise_weight_ptr, depthwise_bias_ptr, sample, row, column, channel[:, None], C, H, W, padding,
            K, S, 1, DTYPE, INTERLEAVED, PIXELS, CHANNELS,
        )  # fmt: skip
        a = activate(a, ACTIVATION)
        at = output.to(tl.int64) * C + channel[None, :]
        weight = tl.load(pointwise_weight_ptr + at, (output < O) & (channel[None, :] < C), 0.0)
        if tl.float64 == DTYPE:
            total += tl.sum(weight[:, :, None] * a[None, :, :], 1)
        else:
            total = tl.dot(weight.to(FACTOR), a.to(weight.dtype).to(FACTOR), total, input_precision="ieee")
    # Last, because a sum that starts from a large bias rounds every small product to the bias's own unit.
    if pointwise_bias_ptr is not None:
        total += tl.load(pointwise_bias_ptr + output, output < O, 0.0).to(DTYPE)
    to = _offsets(sample, row, column, output, O, out_height, out_width, INTERLEAVED)
    tl.store(y_ptr + to, activate(total, OUTPUT_ACTIVATION), (row < out_height) & (output < O))


def separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    stride: int,
    padding: int,
    activation: str,
    output_activation: str,
) -> Tensor:
    layout = common_layout(x)
    x = in_layout(x, layout)
    parameters = [
        None if value is None else value.contiguous()
        for value in (depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias)
    ]
    C, O = x.shape[1], pointwise_weight.shape[0]
    N, _, height, width = output_shape(x, depthwise_weight, stride, padding)
    y = torch.empty((N, O, height, width), dtype=x.dtype, device=x.device, memory_format=layout)
    if N:
        # The smallest sides that the matrix units take are 16. The plain sums of float64 hold a whole cube of values.
        pixels, channels, outputs = (16, 16, 16) if x.dtype == torch.float64 else (32, 16, _side(O, 64))
        launch(separable_conv2d_forward_kernel, N * triton.cdiv(height * width, pixels) * triton.cdiv(O, outputs))(
            x, *parameters, y, C, O, *x.shape[2:], height, width, padding,
            K=depthwise_weight.shape[-1], S=stride, ACTIVATION=activation, OUTPUT_ACTIVATION=output_activation,
            DTYPE=arithmetic_dtype(x), INTERLEAVED=layout is torch.channels_last,
            PIXELS=pixels, CHANNELS=channels, OUTPUTS=outputs, FACTOR=factor_dtype(x),
        )  # fmt: skip
    return y


def _side(size: int, limit: int) -> int:
    return min(max(triton.next_power_of_2(size), 16), limit)
