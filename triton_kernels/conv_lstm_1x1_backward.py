"""1x1 ConvLSTM in Triton, backward, in three parts.

1. From the last step to the first, the gradients of the pre-activations d_pre [T*N, H*W, 4*C] in the dtype of x, from
   the activated gates. Where the weights fit shared memory one program takes its pixels through the whole sequence,
   with the gradients of h and c in registers, and multiplies d_pre by the weights at once. Elsewhere a step is a
   launch: the product d_h = d_pre[t + 1] @ weight with the gradient of the gates as its epilogue, and one product of
   all frames by PyTorch gives the gradient of x.
2. The gradient of the weight, d_pre^T @ [x, h]: a program takes a block of it and some of the pixels. Their sums are
   added by torch, in a fixed order. h before each step is read where it lies, in the arguments and in the output.
3. Before that, the gates that were not kept, of all frames in one launch of the forward kernel: h before every step is
   known, so that no step waits for another.

Bytes per pixel and step for C inputs and C channels in 16 bits, c in float32: part 1 reads gates, cells and the
gradient of the output, 14 C, and writes d_pre and that of x, 10 C; as steps it reads d_pre twice more, and reads and
writes the gradient of c, 24 C. Part 2 reads d_pre, x and h, 12 C.
"""

import torch
import triton
import triton.language as tl
from evkernels.triton_kernels.conv_lstm_1x1 import (
    add_product,
    constants,
    is_resident,
    parameters,
    place,
    side,
    step,
)
from evkernels.triton_kernels.launch import in_layout, launch, tuned
from evkernels.triton_kernels.math import coarse_tanh, tanh
from torch import Tensor

from evkernels.ops.registration import common_layout


@triton.jit
def _gates(
    kept_ptr, again_ptr, frame, pixel, channel, channels, kept, pixels, exists, DTYPE: tl.constexpr
):  # fmt: skip
    """The activated gates: of the first `kept` channels from one tensor, of the others from the other."""
    others = tl.cast(channels, tl.int64) - kept
    at = again_ptr + place(frame, pixel, channel - kept, 4 * others, pixels, True)
    stride = tl.zeros_like(channel) + others
    if kept_ptr is not None:
        is_kept = channel < kept
        at = tl.where(is_kept[None, :], kept_ptr + place(frame, pixel, channel, 4 * kept, pixels, True), at)
        stride = tl.where(is_kept, kept, stride)
    stride = stride[None, :]
    i = tl.load(at, exists, 0.0).to(DTYPE)
    at += stride
    f = tl.load(at, exists, 0.0).to(DTYPE)
    at += stride
    g = tl.load(at, exists, 0.0).to(DTYPE)
    at += stride
    o = tl.load(at, exists, 0.0).to(DTYPE)
    return i, f, g, o


@triton.jit
def gate_gradients(
    d_h, d_c, kept_ptr, again_ptr, cells_ptr, d_pre_ptr, frame, pixel, channel, channels, kept, pixels, exists,
    I: tl.constexpr, F: tl.constexpr, G: tl.constexpr, O: tl.constexpr, DTYPE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """The gradients before the activations of i, f, g and o, which are also stored, and that of c before the step."""
    i, f, g, o = _gates(kept_ptr, again_ptr, frame, pixel, channel, channels, kept, pixels, exists, DTYPE)
    at = place(frame, pixel, channel, 4 * channels, pixels, True)
    stride = tl.cast(channels, tl.int64)
    c = tl.load(cells_ptr + place(frame, pixel, channel, channels, pixels, True), exists, 0.0).to(DTYPE)
    tanh_c = coarse_tanh(f * c + i * g) if NARROW else tanh(f * c + i * g)
    d_c += d_h * o * (1.0 - tanh_c) * (1.0 + tanh_c)
    d_i = d_c * g * i * (1.0 - i)
    d_f = d_c * c * f * (1.0 - f)
    d_g = d_c * i * (1.0 - g) * (1.0 + g)
    d_o = d_h * tanh_c * o * (1.0 - o)
    tl.store(d_pre_ptr + at + I * stride, d_i, exists)
    tl.store(d_pre_ptr + at + F * stride, d_f, exists)
    tl.store(d_pre_ptr + at + G * stride, d_g, exists)
    tl.store(d_pre_ptr + at + O * stride, d_o, exists)
    return d_i, d_f, d_g, d_o, d_c * f


@triton.jit
def _times_weight(
    d_i, d_f, d_g, d_o, weight_i, weight_f, weight_g, weight_o, FACTOR: tl.constexpr, PRECISION: tl.constexpr
):
    total = tl.zeros((d_i.shape[0], weight_i.shape[1]), d_i.dtype)
    total = add_product(total, d_i, weight_i, FACTOR, PRECISION)
    total = add_product(total, d_f, weight_f, FACTOR, PRECISION)
    total = add_product(total, d_g, weight_g, FACTOR, PRECISION)
    return add_product(total, d_o, weight_o, FACTOR, PRECISION)


@tuned([triton.Config({"PIXELS": 32}, num_warps=8), triton.Config({"PIXELS": 16}, num_warps=8)], ["inputs", "channels"])
@triton.jit
def conv_lstm_1x1_backward_sequence_kernel(
    d_output_ptr, d_c_last_ptr, weight_ptr, reset_ptr, kept_ptr, again_ptr, cells_ptr, d_pre_ptr, d_x_ptr,
    d_h_ptr, d_c_ptr, steps, batch, inputs, channels, kept, pixels,
    I: tl.constexpr, F: tl.constexpr, G: tl.constexpr, O: tl.constexpr,
    DTYPE: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr, NARROW: tl.constexpr,
    INTERLEAVED: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    blocks = tl.cdiv(pixels, PIXELS)
    sample = (program // blocks).to(tl.int64)
    pixel = program % blocks * PIXELS + tl.arange(0, PIXELS)
    channel, depth = tl.arange(0, CHANNELS), tl.arange(0, DEPTH)
    exists = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    x_exists = (pixel < pixels)[:, None] & (depth < inputs)[None, :]
    # The rows of a gate's block, and where the next block begins.
    rows = weight_ptr + channel.to(tl.int64)[:, None] * (inputs + channels)
    block = tl.cast(channels, tl.int64) * (inputs + channels)
    to_h, h_exists = rows + inputs + channel[None, :], (channel < channels)[:, None] & (channel < channels)[None, :]
    h_i = tl.load(to_h + I * block, h_exists, 0.0)
    h_f = tl.load(to_h + F * block, h_exists, 0.0)
    h_g = tl.load(to_h + G * block, h_exists, 0.0)
    h_o = tl.load(to_h + O * block, h_exists, 0.0)
    if d_x_ptr is not None:
        to_x, from_exists = rows + depth[None, :], (channel < channels)[:, None] & (depth < inputs)[None, :]
        x_i = tl.load(to_x + I * block, from_exists, 0.0)
        x_f = tl.load(to_x + F * block, from_exists, 0.0)
        x_g = tl.load(to_x + G * block, from_exists, 0.0)
        x_o = tl.load(to_x + O * block, from_exists, 0.0)

    at = place(sample, pixel, channel, channels, pixels, INTERLEAVED)
    d_h = tl.zeros((PIXELS, CHANNELS), DTYPE)
    d_c = tl.zeros((PIXELS, CHANNELS), DTYPE)
    if d_c_last_ptr is not None:
        d_c += tl.load(d_c_last_ptr + at, exists, 0.0).to(DTYPE)
    frame = sample + tl.cast(steps - 1, tl.int64) * batch
    for _ in range(steps):
        if d_output_ptr is not None:
            here = place(frame, pixel, channel, channels, pixels, INTERLEAVED)
            d_h += tl.load(d_output_ptr + here, exists, 0.0).to(DTYPE)
        d_i, d_f, d_g, d_o, d_c = gate_gradients(
            d_h, d_c, kept_ptr, again_ptr, cells_ptr, d_pre_ptr, frame, pixel, channel, channels, kept, pixels, exists,
            I, F, G, O, DTYPE, NARROW,
        )  # fmt: skip
        d_h = _times_weight(d_i, d_f, d_g, d_o, h_i, h_f, h_g, h_o, FACTOR, PRECISION)
        if d_x_ptr is not None:
            d_x = _times_weight(d_i, d_f, d_g, d_o, x_i, x_f, x_g, x_o, FACTOR, PRECISION)
            tl.store(d_x_ptr + place(frame, pixel, depth, inputs, pixels, INTERLEAVED), d_x, x_exists)
        if reset_ptr is not None:
            restarts = tl.load(reset_ptr + frame) != 0
            d_h = tl.where(restarts, 0.0, d_h)
            d_c = tl.where(restarts, 0.0, d_c)
        frame -= batch
    tl.store(d_h_ptr + at, d_h, exists)
    tl.store(d_c_ptr + at, d_c, exists)


@tuned([triton.Config({"PIXELS": 32}, num_warps=4), triton.Config({"PIXELS": 32}, num_warps=8)], ["inputs", "channels"])
@triton.jit
def conv_lstm_1x1_backward_step_kernel(
    d_output_ptr, d_after_ptr, d_c_after_ptr, reset_after_ptr, weight_ptr, kept_ptr, again_ptr, cells_ptr, d_pre_ptr,
    d_c_ptr, inputs, channels, kept, pixels,
    I: tl.constexpr, F: tl.constexpr, G: tl.constexpr, O: tl.constexpr,
    DTYPE: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr, NARROW: tl.constexpr,
    INTERLEAVED: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """One step; `after` is what the step after it left: d_pre, the gradient of its c, and whether it restarted."""
    program = tl.program_id(0)
    blocks, channel_blocks = tl.cdiv(pixels, PIXELS), tl.cdiv(channels, CHANNELS)
    sample = (program // channel_blocks // blocks).to(tl.int64)
    pixel = program // channel_blocks % blocks * PIXELS + tl.arange(0, PIXELS)
    channel = program % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)
    exists = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    flows = (pixel < pixels)[:, None]
    if reset_after_ptr is not None:
        flows = (pixel < tl.where(tl.load(reset_after_ptr + sample) != 0, 0, pixels))[:, None]
    d_h = tl.zeros((PIXELS, CHANNELS), DTYPE)
    if d_after_ptr is not None:
        for first in range(0, 4 * channels, DEPTH):
            row = first + tl.arange(0, DEPTH)
            d_after = tl.load(
                d_after_ptr + place(sample, pixel, row, 4 * channels, pixels, True),
                flows & (row < 4 * channels)[None, :], 0.0,
            )  # fmt: skip
            weight = tl.load(
                weight_ptr + row.to(tl.int64)[:, None] * (inputs + channels) + inputs + channel[None, :],
                (row < 4 * channels)[:, None] & (channel < channels)[None, :], 0.0,
            )  # fmt: skip
            d_h = add_product(d_h, d_after, weight, FACTOR, PRECISION)
    if d_output_ptr is not None:
        at = place(sample, pixel, channel, channels, pixels, INTERLEAVED)
        d_h += tl.load(d_output_ptr + at, exists, 0.0).to(DTYPE)
    at = place(sample, pixel, channel, channels, pixels, True)
    d_c = tl.zeros((PIXELS, CHANNELS), DTYPE)
    if d_c_after_ptr is not None:
        d_c += tl.load(d_c_after_ptr + at, exists & flows, 0.0).to(DTYPE)
    _, _, _, _, d_c = gate_gradients(
        d_h, d_c, kept_ptr, again_ptr, cells_ptr, d_pre_ptr, sample, pixel, channel, channels, kept, pixels, exists,
        I, F, G, O, DTYPE, NARROW,
    )  # fmt: skip
    tl.store(d_c_ptr + at, d_c, exists)


@triton.jit
def conv_lstm_1x1_backward_weight_kernel(
    x_ptr, h_ptr, output_ptr, reset_ptr, d_pre_ptr, d_weight_ptr, d_bias_ptr,
    frames, batch, inputs, channels, pixels, parts,
    DTYPE: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Sums [parts, 4 * channels, inputs + channels] and [parts, 4 * channels], each over every parts-th tile of pixels.

    A program has a block of columns of x and the same block of columns of h.
    """
    program = tl.program_id(0)
    row_blocks, column_blocks = tl.cdiv(4 * channels, ROWS), tl.cdiv(tl.maximum(inputs, channels), COLUMNS)
    part = (program // column_blocks // row_blocks).to(tl.int64)
    row = program % row_blocks * ROWS + tl.arange(0, ROWS)
    column_block = program // row_blocks % column_blocks
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    blocks = tl.cdiv(pixels, DEPTH)
    from_x, from_h = tl.zeros((ROWS, COLUMNS), DTYPE), tl.zeros((ROWS, COLUMNS), DTYPE)
    d_bias = tl.zeros((ROWS,), DTYPE)
    for tile in range(part, tl.cast(frames, tl.int64) * blocks, parts):
        frame, pixel = tile // blocks, tile % blocks * DEPTH + tl.arange(0, DEPTH)
        pixel_exists = (pixel < pixels)[:, None]
        d_pre = tl.load(
            d_pre_ptr + place(frame, pixel, row, 4 * channels, pixels, True),
            pixel_exists & (row < 4 * channels)[None, :], 0.0,
        )  # fmt: skip
        x = tl.load(
            x_ptr + place(frame, pixel, column, inputs, pixels, INTERLEAVED),
            pixel_exists & (column < inputs)[None, :], 0.0,
        )  # fmt: skip
        # h before the step: of the first ones in the arguments, of all others in the output of the step before.
        is_first = frame < batch
        before = tl.where(is_first, h_ptr, output_ptr)
        before += place(tl.where(is_first, frame, frame - batch), pixel, column, channels, pixels, INTERLEAVED)
        state_exists = pixel_exists
        if reset_ptr is not None:
            state_exists = (pixel < tl.where(tl.load(reset_ptr + frame) != 0, 0, pixels))[:, None]
        h = tl.load(before, state_exists & (column < channels)[None, :], 0.0)
        d_bias += tl.sum(d_pre.to(DTYPE), 0)
        d_pre = tl.trans(d_pre)
        from_x = add_product(from_x, d_pre, x, FACTOR, PRECISION)
        from_h = add_product(from_h, d_pre, h, FACTOR, PRECISION)
    row_exists = (row < 4 * channels)[:, None]
    to = d_weight_ptr + (part * 4 * channels + row)[:, None] * (inputs + channels) + column[None, :]
    tl.store(to, from_x, row_exists & (column < inputs)[None, :])
    tl.store(to + inputs, from_h, row_exists & (column < channels)[None, :])
    if column_block == 0:
        tl.store(d_bias_ptr + part * 4 * channels + row, d_bias, row < 4 * channels)


def conv_lstm_1x1_backward(
    grad_output: Tensor | None,
    grad_c_last: Tensor | None,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reset: Tensor | None,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    order: str,
    precision: str,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    layout = common_layout(x)
    x, h, output, grad_output, grad_c_last = (
        in_layout(value, layout) for value in (x, h, output, grad_output, grad_c_last)
    )
    matrix, bias, reset = parameters(weight, bias, reset)
    again = _gates_again(x, h, matrix, bias, reset, output, gates, order, precision)
    d_pre = x.new_empty((x.shape[0], x.shape[2] * x.shape[3], 4 * h.shape[1]))
    walk = _through_sequence if is_resident(x, h.shape[1]) else _step_by_step
    need_x, need_h, need_c, need_weight, need_bias = output_mask
    d_x, d_h, d_c = walk(
        grad_output, grad_c_last, x, h, c, matrix, reset, gates, again, cells, d_pre, order, precision, need_x
    )
    d_weight = d_bias = None
    if need_weight or need_bias:
        d_weight, d_bias = _weight_gradients(x, h, output, reset, d_pre, precision)
    return (
        d_x if need_x else x.new_empty(0),
        d_h if need_h else x.new_empty(0),
        d_c if need_c else x.new_empty(0),
        d_weight.to(weight.dtype).view_as(weight) if need_weight else x.new_empty(0),
        d_bias.to(weight.dtype) if need_bias else x.new_empty(0),
    )


def _gates_again(x, h, matrix, bias, reset, output, gates, order: str, precision: str) -> Tensor:
    """The activated gates [T*N, H*W, 4*C'] of the C' channels that `gates` leaves out, of all frames at once."""
    (frames, _, height, width), (batch, channels) = x.shape, h.shape[:2]
    others = channels - (gates.shape[2] // 4 if gates.dim() == 3 else 0)
    again = x.new_empty(frames, height * width, 4 * others)
    if again.numel():
        before = in_layout(torch.cat([h, output[: frames - batch]]), common_layout(x))
        restarts = None if reset is None else reset.flatten()
        step(x, before, None, matrix, bias, restarts, None, None, again, None, order, precision)
    return again


def _through_sequence(
    grad_output, grad_c_last, x, h, c, matrix, reset, gates, again, cells, d_pre, order, precision, need_x
) -> tuple[Tensor | None, Tensor, Tensor]:
    layout = common_layout(x)
    (frames, inputs, height, width), (batch, channels) = x.shape, h.shape[:2]
    d_x = torch.empty_like(x, memory_format=layout) if need_x else None
    d_h, d_c = torch.empty_like(h, memory_format=layout), torch.empty_like(c, memory_format=layout)
    if h.numel():
        launch(conv_lstm_1x1_backward_sequence_kernel, lambda t: batch * triton.cdiv(height * width, t["PIXELS"]))(
            grad_output, grad_c_last, matrix, reset, gates if gates.numel() else None, again, cells, d_pre,
            d_x if inputs else None, d_h, d_c, frames // batch, batch, inputs, channels, channels - again.shape[2] // 4,
            height * width, **constants(x, order, precision), DEPTH=side(inputs), CHANNELS=side(channels),
        )  # fmt: skip
    return d_x, d_h, d_c


def _step_by_step(
    grad_output, grad_c_last, x, h, c, matrix, reset, gates, again, cells, d_pre, order, precision, need_x
) -> tuple[Tensor | None, Tensor, Tensor]:
    (frames, inputs, height, width), (batch, channels) = x.shape, h.shape[:2]
    wide = torch.promote_types(x.dtype, torch.float32)
    buffers = [x.new_empty((batch, height * width, channels), dtype=wide) for _ in range(2)]
    d_after, reset_after = None, None
    d_c = None if grad_c_last is None else grad_c_last.flatten(2).transpose(1, 2).contiguous()
    tile = {"CHANNELS": 16, "DEPTH": 16} if x.dtype == torch.float64 else {"CHANNELS": 32, "DEPTH": 32}

    def programs(tile):
        return batch * triton.cdiv(height * width, tile["PIXELS"]) * triton.cdiv(channels, tile["CHANNELS"])

    for time in range(frames // batch - 1, -1, -1) if h.numel() else ():
        now, d_c_before = slice(time * batch, (time + 1) * batch), buffers[time % 2]
        launch(conv_lstm_1x1_backward_step_kernel, programs)(
            None if grad_output is None else grad_output[now], d_after, d_c, reset_after, matrix,
            gates[now] if gates.numel() else None, again[now], cells[now], d_pre[now], d_c_before, inputs, channels,
            channels - again.shape[2] // 4, height * width, **constants(x, order, precision), **tile,
        )  # fmt: skip
        d_after, d_c, reset_after = d_pre[now], d_c_before, None if reset is None else reset[time]
    d_x = _as_frames(d_pre @ matrix[:, :inputs], x) if need_x else None
    state = d_pre[:batch] @ matrix[:, inputs:], d_c.to(c.dtype)
    d_h, d_c = (value if reset is None else value.masked_fill(reset[0, :, None, None] != 0, 0) for value in state)
    return d_x, _as_frames(d_h, h), _as_frames(d_c, h)


def _as_frames(value: Tensor, like: Tensor) -> Tensor:
    """[N, H*W, C] as a tensor of the shape of `like`, in its layout."""
    return in_layout(value.transpose(1, 2).unflatten(2, like.shape[2:]), common_layout(like))


def _weight_gradients(
    x: Tensor, h: Tensor, output: Tensor, reset: Tensor | None, d_pre: Tensor, precision: str
) -> tuple:
    (frames, inputs, height, width), (batch, channels) = x.shape, h.shape[:2]
    # The plain sums of float64 hold a whole cube of values.
    # With 64 rows float32 in three products of the matrix units spills registers.
    rows, columns, depth = (16, 16, 16) if x.dtype == torch.float64 else (32, 64, 32)
    tiles = triton.cdiv(4 * channels, rows) * triton.cdiv(max(inputs, channels), columns)
    # Enough programs for the largest GPUs, and the same number on all: it decides the order of the sums.
    parts = max(1, min(frames * triton.cdiv(height * width, depth), triton.cdiv(512, tiles)))
    wide = torch.promote_types(x.dtype, torch.float32)
    d_weight = x.new_empty((parts, 4 * channels, inputs + channels), dtype=wide)
    d_bias = x.new_empty((parts, 4 * channels), dtype=wide)
    if output.numel() == 0:
        return d_weight[0].zero_(), d_bias[0].zero_()
    names = ("DTYPE", "FACTOR", "PRECISION", "INTERLEAVED")
    options = {name: value for name, value in constants(x, "ifgo", precision).items() if name in names}
    launch(conv_lstm_1x1_backward_weight_kernel, tiles * parts)(
        x, h, output, reset, d_pre, d_weight, d_bias, frames, batch, inputs, channels, height * width, parts,
        **options, ROWS=rows, COLUMNS=columns, DEPTH=depth, num_warps=4,
    )  # fmt: skip
    return d_weight.sum(0, dtype=torch.float64), d_bias.sum(0, dtype=torch.float64)
