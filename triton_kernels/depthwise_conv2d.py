"""Depthwise convolution in Triton: one program takes a tile of CHANNELS x PIXELS of one sample.

Both layouts are strides to the same kernels: tiles are long in pixels if contiguous, wide in channels if channels_last,
so that neighbouring lanes touch neighbouring elements; small maps share a tile among channels. The backward pass is
two kernels: the first recomputes the pre-activation, forms the gradient there and one partial sum per tile of the
gradients of weights and bias (added up by torch, in a fixed order), the second gathers the gradient of the input.
"""

import torch
import triton
import triton.language as tl
from evkernels.triton_kernels.launch import arithmetic_dtype, in_layout, launch
from evkernels.triton_kernels.math import activate, activation_gradient
from torch import Tensor

from evkernels.ops.depthwise_conv2d import output_shape
from evkernels.ops.registration import common_layout


@triton.jit
def _tile(C, height, width, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """This program's sample and block of pixels, and its rows and columns [1, PIXELS] and channels [CHANNELS, 1]."""
    pixel_blocks = (tl.cast(height, tl.int64) * width + PIXELS - 1) // PIXELS
    channel_blocks = (C + CHANNELS - 1) // CHANNELS
    program = tl.program_id(0).to(tl.int64)
    block = program % pixel_blocks
    channel_block = program // pixel_blocks % channel_blocks
    sample = program // pixel_blocks // channel_blocks
    first_row = block * PIXELS // width
    within = (block * PIXELS - first_row * width).to(tl.int32) + tl.arange(0, PIXELS)[None, :]
    row = first_row + within // width
    channel = channel_block * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    return sample, block, row, within % width, channel


@triton.jit
def _offsets(sample, row, column, channel, C, height, width, INTERLEAVED: tl.constexpr):
    """64-bit offsets in a tensor of [*, C, height, width]."""
    if INTERLEAVED:
        return ((sample * height + row) * width + column) * C + channel
    else:
        return ((sample * C + channel) * height + row) * width + column


@triton.jit
def _steps(C, height, width, INTERLEAVED: tl.constexpr):
    """Distance in memory from a row and from a column to the next."""
    if INTERLEAVED:
        return tl.cast(width, tl.int64) * C, C
    else:
        return tl.cast(width, tl.int64), 1


@triton.jit
def _pre_activation(
    x_ptr, weight_ptr, bias_ptr, sample, row, column, channel, C, H, W, padding,
    K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr, INTERLEAVED: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((CHANNELS, PIXELS), DTYPE)
    exists = channel < C
    if bias_ptr is not None:
        total += tl.load(bias_ptr + channel, exists, 0.0).to(DTYPE)
    top, left = row * S - padding, column * S - padding
    corner = x_ptr + _offsets(sample, top, left, channel, C, H, W, INTERLEAVED)
    row_step, column_step = _steps(C, H, W, INTERLEAVED)
    for r in range(K):
        inside_rows = (top >= -r * D) & (top < H - r * D) & exists
        for c in range(K):
            inside = inside_rows & (left >= -c * D) & (left < W - c * D)
            value = tl.load(corner + (r * row_step + c * column_step) * D, inside, 0.0).to(DTYPE)
            total += value * tl.load(weight_ptr + channel * (K * K) + (r * K + c), exists, 0.0).to(DTYPE)
    return total


@triton.jit
def depthwise_conv2d_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, C, H, W, out_height, out_width, padding,
    K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, _, row, column, channel = _tile(C, out_height, out_width, PIXELS, CHANNELS)
    pre = _pre_activation(
        x_ptr, weight_ptr, bias_ptr, sample, row, column, channel, C, H, W, padding,
        K, S, D, DTYPE, INTERLEAVED, PIXELS, CHANNELS,
    )  # fmt: skip
    to = _offsets(sample, row, column, channel, C, out_height, out_width, INTERLEAVED)
    tl.store(y_ptr + to, activate(pre, ACTIVATION), (row < out_height) & (channel < C))


@triton.jit
def depthwise_conv2d_backward_sums_kernel(
    x_ptr, weight_ptr, bias_ptr, d_y_ptr, d_pre_ptr, sums_ptr, C, H, W, out_height, out_width, padding, pixel_blocks,
    K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, block, row, column, channel = _tile(C, out_height, out_width, PIXELS, CHANNELS)
    at = _offsets(sample, row, column, channel, C, out_height, out_width, INTERLEAVED)
    exists = (row < out_height) & (channel < C)
    d = tl.load(d_y_ptr + at, exists, 0.0).to(DTYPE)
    if ACTIVATION != "none":
        pre = _pre_activation(
            x_ptr, weight_ptr, bias_ptr, sample, row, column, channel, C, H, W, padding,
            K, S, D, DTYPE, INTERLEAVED, PIXELS, CHANNELS,
        )  # fmt: skip
        d = tl.where(exists, activation_gradient(pre, d, ACTIVATION), 0.0)
        if d_pre_ptr is not None:
            tl.store(d_pre_ptr + at, d, exists)
    if sums_ptr is not None:
        # sums [samples * pixel_blocks, K * K + 1, C]
        to = sums_ptr + (sample * pixel_blocks + block) * (K * K + 1) * C + channel
        top, left = row * S - padding, column * S - padding
        corner = x_ptr + _offsets(sample, top, left, channel, C, H, W, INTERLEAVED)
        row_step, column_step = _steps(C, H, W, INTERLEAVED)
        for r in range(K):
            inside_rows = (top >= -r * D) & (top < H - r * D) & exists
            for c in range(K):
                inside = inside_rows & (left >= -c * D) & (left < W - c * D)
                value = tl.load(corner + (r * row_step + c * column_step) * D, inside, 0.0).to(DTYPE)
                tl.store(to + (r * K + c) * C, tl.sum(d * value, 1)[:, None], channel < C)
        tl.store(to + K * K * C, tl.sum(d, 1)[:, None], channel < C)


@triton.jit
def depthwise_conv2d_backward_input_kernel(
    d_ptr, weight_ptr, d_x_ptr, C, H, W, out_height, out_width, padding,
    K: tl.constexpr, S: tl.constexpr, D: tl.constexpr, DTYPE: tl.constexpr, INTERLEAVED: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    sample, _, row, column, channel = _tile(C, H, W, PIXELS, CHANNELS)
    total = tl.zeros((CHANNELS, PIXELS), DTYPE)
    exists = channel < C
    for r in range(K):
        # Where a multiple of S: the output that meets this pixel at tap row r, and below at tap (r, c).
        y = row + padding - r * D
        rows_meet = (y >= 0) & (y % S == 0) & (y < out_height * S) & exists
        for c in range(K):
            x = column + padding - c * D
            meets = rows_meet & (x >= 0) & (x % S == 0) & (x < out_width * S)
            at = _offsets(sample, y // S, x // S, channel, C, out_height, out_width, INTERLEAVED)
            value = tl.load(d_ptr + at, meets, 0.0).to(DTYPE)
            total += value * tl.load(weight_ptr + channel * (K * K) + (r * K + c), exists, 0.0).to(DTYPE)
    to = _offsets(sample, row, column, channel, C, H, W, INTERLEAVED)
    tl.store(d_x_ptr + to, total, (row < H) & (channel < C))


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int, activation: str, dilation: int
) -> Tensor:
    layout = common_layout(x)
    x, weight, bias = in_layout(x, layout), weight.contiguous(), None if bias is None else bias.contiguous()
    y = x.new_empty(output_shape(x, weight, stride, padding, dilation)).contiguous(memory_format=layout)
    if y.numel():
        launch(depthwise_conv2d_forward_kernel, _programs(y, layout))(
            x, weight, bias, y, *x.shape[1:], *y.shape[2:], padding,
            S=stride, D=dilation, ACTIVATION=activation, **_constants(x, weight, layout), **_tiles(y, layout),
        )  # fmt: skip
    return y


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
    layout = common_layout(x)
    grad_output, x, weight = in_layout(grad_output, layout), in_layout(x, layout), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    wide = torch.promote_types(x.dtype, torch.float32)
    recompute, need_sums = activation != "none", need_weight or need_bias
    d, sums, k = grad_output, None, weight.shape[-1]
    constants = {"S": stride, "D": dilation, **_constants(x, weight, layout)}
    sizes = (*x.shape[1:], *grad_output.shape[2:], padding)
    pixel_blocks = triton.cdiv(grad_output.shape[2] * grad_output.shape[3], _tile_size(grad_output, layout)[0])
    grad_x = torch.empty_like(x, memory_format=layout) if need_x else x.new_empty(0)
    if need_sums:
        sums = x.new_empty(x.shape[0] * pixel_blocks, k * k + 1, x.shape[1], dtype=wide)
    if recompute and need_x:
        d = torch.empty_like(grad_output, dtype=wide, memory_format=layout)
    if x.numel():
        if recompute or need_sums:
            launch(depthwise_conv2d_backward_sums_kernel, _programs(grad_output, layout))(
                x, weight, bias, grad_output, d if d is not grad_output else None, sums, *sizes, pixel_blocks,
                ACTIVATION=activation, **constants, **_tiles(grad_output, layout),
            )  # fmt: skip
        if need_x:
            launch(depthwise_conv2d_backward_input_kernel, _programs(x, layout))(
                d, weight, grad_x, *sizes, **constants, **_tiles(x, layout)
            )
    total = sums.sum(0, dtype=torch.float64).to(x.dtype) if need_sums else None
    return (
        grad_x,
        total[:-1].t().reshape(weight.shape).contiguous() if need_weight else x.new_empty(0),
        total[-1].clone() if need_bias else x.new_empty(0),
    )


def _tile_size(shape_of: Tensor, layout: torch.memory_format) -> tuple[int, int]:
    """Pixels and channels of a tile: 512 elements, as long as possible in the direction of memory."""
    _, C, height, width = shape_of.shape
    if layout is torch.channels_last:
        channels = min(32, triton.next_power_of_2(C))
        return 512 // channels, channels
    pixels = min(512, triton.next_power_of_2(height * width))
    return pixels, 512 // pixels


def _tiles(shape_of: Tensor, layout: torch.memory_format) -> dict:
    """The tile for a kernel that writes a tensor of this shape."""
    pixels, channels = _tile_size(shape_of, layout)
    return {"PIXELS": pixels, "CHANNELS": channels}


def _programs(shape_of: Tensor, layout: torch.memory_format) -> int:
    N, C, height, width = shape_of.shape
    pixels, channels = _tile_size(shape_of, layout)
    return N * triton.cdiv(C, channels) * triton.cdiv(height * width, pixels)


def _constants(x: Tensor, weight: Tensor, layout: torch.memory_format) -> dict:
    return {"K": weight.shape[-1], "DTYPE": arithmetic_dtype(x), "INTERLEAVED": layout is torch.channels_last}
