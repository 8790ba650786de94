"""1x1 ConvLSTM in Triton, forward: the product of a tile of PIXELS x 4 * CHANNELS with the gates as its epilogue.

The four gates of a channel are neighbours in the tile and meet in registers; pre-activations never reach memory. No
pixel touches another, so where the weights fit shared memory (16-bit factors, up to 64 channels) one program takes its
pixels through the whole sequence: weights are loaded once, and h and c between steps stay on the chip. Elsewhere a step
is a launch, and each program takes a block of channels.

Bytes per pixel and step, for C inputs and C channels in 16 bits with c in float32: the step reads x, h, c and writes
h, c, 14 C; the sequence form reads x and writes h, 4 C, which is the floor, and once per sequence 10 C for h, c and
c_last. What a gradient keeps adds at most 9.2 C ("gates", of up to 65 % of the channels) or 4 C ("recompute"). Plain
convolution and gates: 34 C.

On paper the sequence form at 64 channels keeps to the time of its bytes (1.0 on an A100 and an H100); one step of it
takes 1.0 and 1.4 times, where weights are read by every program. The step at 128 channels takes 1.8 and 2.2 times with
tiles of 64 pixels, 2.8 and 3.1 with 32: a program has 16 channels, so that eight read x and h again, through the
level-2 cache and shared memory, and each computes its addresses again.
"""

import torch
import triton
import triton.language as tl
from evkernels.triton_kernels.launch import arithmetic_dtype, factor_dtype, in_layout, launch, tuned
from evkernels.triton_kernels.math import coarse_tanh, sigmoid, tanh
from torch import Tensor

from evkernels.ops.registration import common_layout
from evkernels.reference import kept_channels


@triton.jit
def place(sample, pixel, channel, channels, pixels, INTERLEAVED: tl.constexpr):
    """64-bit offsets [PIXELS, CHANNELS] in a tensor of [*, channels, pixels]; channels side by side if INTERLEAVED."""
    sample, pixel, channel = sample.to(tl.int64), pixel.to(tl.int64)[:, None], channel.to(tl.int64)[None, :]
    if INTERLEAVED:
        return (sample * pixels + pixel) * channels + channel
    else:
        return (sample * channels + channel) * pixels + pixel


@triton.jit
def add_product(total, a, b, FACTOR: tl.constexpr, PRECISION: tl.constexpr):
    """A @ b added to the total, on the matrix units except in float64, which is summed plainly."""
    if total.dtype == tl.float64:
        return total + tl.sum(a[:, :, None] * b[None, :, :], 1)
    else:
        return tl.dot(a.to(FACTOR), b.to(FACTOR), total, input_precision=PRECISION)


@triton.jit
def gate_columns(CHANNELS: tl.constexpr):
    """Gate (i, f, g, o: 0 to 3) and channel of each of the 4 * CHANNELS columns of a tile of pre-activations.

    The gate is the lowest and the highest bit of the column, which the matrix units keep in one thread whatever the
    number of warps: all four gates of a channel meet in registers. With the gate in two neighbouring bits every
    pre-activation would pass through shared memory.
    """
    column = tl.arange(0, 4 * CHANNELS)
    return column % 2 + column // (2 * CHANNELS) * 2, column // 2 % CHANNELS


@triton.jit
def weight_rows(gate, channel, channels, I: tl.constexpr, F: tl.constexpr, G: tl.constexpr, O: tl.constexpr):
    """The rows of the weight [4 * channels, ...] that hold these gates of these channels."""
    block = tl.where(gate == 0, I, tl.where(gate == 1, F, tl.where(gate == 2, G, O)))
    return block.to(tl.int64) * channels + channel


@triton.jit
def activated(pre, NARROW: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """i, f, g, o as tiles [PIXELS, CHANNELS], from pre-activations in the columns of `gate_columns`."""
    even, odd = tl.split(tl.permute(tl.reshape(pre, (PIXELS, 2, CHANNELS, 2)), (0, 2, 1, 3)))
    i, g = tl.split(even)
    f, o = tl.split(odd)
    return sigmoid(i), sigmoid(f), coarse_tanh(g) if NARROW else tanh(g), sigmoid(o)


@triton.jit
def store_gates(gates_ptr, i, f, g, o, frame, pixel, channel, channels, pixels):
    """Those of the first `channels` of all."""
    exists = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    to = gates_ptr + place(frame, pixel, channel, 4 * channels, pixels, True)
    stride = tl.cast(channels, tl.int64)
    tl.store(to, i, exists)
    to += stride
    tl.store(to, f, exists)
    to += stride
    tl.store(to, g, exists)
    to += stride
    tl.store(to, o, exists)


@tuned([triton.Config({"PIXELS": 32}, num_warps=8), triton.Config({"PIXELS": 16}, num_warps=4)], ["inputs", "channels"])
@triton.jit
def conv_lstm_1x1_sequence_kernel(
    x_ptr, h_ptr, c_ptr, weight_ptr, bias_ptr, reset_ptr, output_ptr, c_last_ptr, gates_ptr, cells_ptr,
    steps, batch, inputs, channels, kept, pixels,
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
    gate, of_channel = gate_columns(CHANNELS)
    row = weight_rows(gate, of_channel, channels, I, F, G, O)
    in_weight = weight_ptr + row[None, :] * (inputs + channels)
    column_exists = (of_channel < channels)[None, :]
    weight_x = tl.load(in_weight + depth[:, None], column_exists & (depth < inputs)[:, None], 0.0)
    weight_h = tl.load(in_weight + inputs + channel[:, None], column_exists & (channel < channels)[:, None], 0.0)
    bias = tl.zeros((4 * CHANNELS,), DTYPE)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + row, of_channel < channels, 0.0).to(DTYPE)

    at = place(sample, pixel, channel, channels, pixels, INTERLEAVED)
    h = tl.load(h_ptr + at, exists, 0.0)
    c = tl.load(c_ptr + at, exists, 0.0)
    frame = sample
    for _ in range(steps):
        if reset_ptr is not None:
            restarts = tl.load(reset_ptr + frame) != 0
            h = tl.where(restarts, 0.0, h).to(h.dtype)
            c = tl.where(restarts, 0.0, c).to(c.dtype)
        if cells_ptr is not None:
            tl.store(cells_ptr + place(frame, pixel, channel, channels, pixels, True), c, exists)
        x = tl.load(x_ptr + place(frame, pixel, depth, inputs, pixels, INTERLEAVED), x_exists, 0.0)
        pre = tl.zeros((PIXELS, 4 * CHANNELS), DTYPE)
        pre = add_product(pre, x, weight_x, FACTOR, PRECISION)
        pre = add_product(pre, h, weight_h, FACTOR, PRECISION) + bias[None, :]
        i, f, g, o = activated(pre, NARROW, PIXELS, CHANNELS)
        if gates_ptr is not None:
            store_gates(gates_ptr, i, f, g, o, frame, pixel, channel, kept, pixels)
        c = (f * c.to(DTYPE) + i * g).to(c.dtype)
        tanh_c = coarse_tanh(c.to(DTYPE)) if NARROW else tanh(c.to(DTYPE))
        h = (o * tanh_c).to(h.dtype)
        tl.store(output_ptr + place(frame, pixel, channel, channels, pixels, INTERLEAVED), h, exists)
        frame += batch
    tl.store(c_last_ptr + at, c, exists)


@tuned([triton.Config({"PIXELS": 32}, num_warps=8), triton.Config({"PIXELS": 64}, num_warps=8)], ["inputs", "channels"])
@triton.jit
def conv_lstm_1x1_step_kernel(
    x_ptr, h_ptr, c_ptr, weight_ptr, bias_ptr, reset_ptr, output_ptr, c_next_ptr, gates_ptr, cells_ptr,
    inputs, channels, kept, pixels, FIRST: tl.constexpr,
    I: tl.constexpr, F: tl.constexpr, G: tl.constexpr, O: tl.constexpr,
    DTYPE: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr, NARROW: tl.constexpr,
    INTERLEAVED: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """The channels from FIRST on: with `output` the step, and the gates of `kept` of them, else the gates of all."""
    program = tl.program_id(0)
    blocks, channel_blocks = tl.cdiv(pixels, PIXELS), tl.cdiv(channels - FIRST, CHANNELS)
    sample = (program // channel_blocks // blocks).to(tl.int64)
    pixel = program // channel_blocks % blocks * PIXELS + tl.arange(0, PIXELS)
    block = program % channel_blocks * CHANNELS
    gate, of_channel = gate_columns(CHANNELS)
    of_channel += FIRST + block
    row = weight_rows(gate, of_channel, channels, I, F, G, O)
    in_weight = weight_ptr + row[None, :] * (inputs + channels)
    column_exists, pixel_exists = (of_channel < channels)[None, :], (pixel < pixels)[:, None]
    state_exists = pixel_exists
    if reset_ptr is not None:
        state_exists = (pixel < tl.where(tl.load(reset_ptr + sample) != 0, 0, pixels))[:, None]

    pre = tl.zeros((PIXELS, 4 * CHANNELS), DTYPE)
    for first in range(0, inputs, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        x = tl.load(
            x_ptr + place(sample, pixel, depth, inputs, pixels, INTERLEAVED),
            pixel_exists & (depth < inputs)[None, :], 0.0,
        )  # fmt: skip
        weight = tl.load(in_weight + depth[:, None], column_exists & (depth < inputs)[:, None], 0.0)
        pre = add_product(pre, x, weight, FACTOR, PRECISION)
    for first in range(0, channels, DEPTH):
        depth = first + tl.arange(0, DEPTH)
        h = tl.load(
            h_ptr + place(sample, pixel, depth, channels, pixels, INTERLEAVED),
            state_exists & (depth < channels)[None, :], 0.0,
        )  # fmt: skip
        weight = tl.load(in_weight + inputs + depth[:, None], column_exists & (depth < channels)[:, None], 0.0)
        pre = add_product(pre, h, weight, FACTOR, PRECISION)
    # Last, because a sum that starts from a large bias rounds every small product to the bias's own unit.
    if bias_ptr is not None:
        pre += tl.load(bias_ptr + row, of_channel < channels, 0.0).to(DTYPE)[None, :]

    i, f, g, o = activated(pre, NARROW, PIXELS, CHANNELS)
    in_kept = block + tl.arange(0, CHANNELS)
    channel = FIRST + in_kept
    exists = pixel_exists & (channel < channels)[None, :]
    if gates_ptr is not None:
        count = tl.cast(channels, tl.int64) - FIRST if output_ptr is None else kept
        store_gates(gates_ptr, i, f, g, o, sample, pixel, in_kept, count, pixels)
    if output_ptr is not None:
        at = place(sample, pixel, channel, channels, pixels, INTERLEAVED)
        c = tl.load(c_ptr + at, exists & state_exists, 0.0)
        if cells_ptr is not None:
            tl.store(cells_ptr + place(sample, pixel, channel, channels, pixels, True), c, exists)
        c = (f * c.to(DTYPE) + i * g).to(c.dtype)
        tanh_c = coarse_tanh(c.to(DTYPE)) if NARROW else tanh(c.to(DTYPE))
        tl.store(output_ptr + at, o * tanh_c, exists)
        tl.store(c_next_ptr + at, c, exists)


def conv_lstm_1x1(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reset: Tensor | None,
    order: str,
    save: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout = common_layout(x)
    x, h, c = (in_layout(value, layout) for value in (x, h, c))
    weight, bias, reset = parameters(weight, bias, reset)
    (frames, inputs, height, width), (batch, channels) = x.shape, h.shape[:2]
    output = torch.empty((frames, channels, height, width), dtype=x.dtype, device=x.device, memory_format=layout)
    c_last = torch.empty_like(c, memory_format=layout)
    gates = x.new_empty((frames, height * width, 4 * kept_channels(channels)) if save == "gates" else 0)
    cells = c.new_empty((frames, height * width, channels) if save != "none" else 0)
    kept = gates if gates.numel() else None, cells if save != "none" else None
    if output.numel() == 0:
        return output, c_last, gates, cells
    if is_resident(x, channels):
        launch(conv_lstm_1x1_sequence_kernel, lambda tile: batch * triton.cdiv(height * width, tile["PIXELS"]))(
            x, h, c, weight, bias, reset, output, c_last, *kept, frames // batch, batch, inputs, channels,
            kept_channels(channels), height * width, **constants(x, order, precision),
            DEPTH=side(inputs), CHANNELS=side(channels),
        )  # fmt: skip
        return output, c_last, gates, cells
    # c goes from one buffer to the other so that no launch writes what it reads; the last one writes c_last.
    buffers = c_last, torch.empty_like(c_last)
    steps = [None if value is None else value.split(batch) for value in (x, output, *kept)]
    for time in range(frames // batch):
        x_now, output_now, *kept_now = (None if value is None else value[time] for value in steps)
        c_next = buffers[(frames // batch - time + 1) % 2]
        restarts = None if reset is None else reset[time]
        step(x_now, h, c, weight, bias, restarts, output_now, c_next, *kept_now, order, precision)
        h, c = output_now, c_next
    return output, c_last, gates, cells


def step(x, h, c, weight, bias, reset, output, c_next, gates, cells, order: str, precision: str) -> None:
    """Runs the step kernel on frames that know nothing of each other.

    Without `output` it computes the gates alone, of the channels that `save="gates"` leaves out or of all, by their
    number.
    """
    (frames, inputs, height, width), channels = x.shape, h.shape[1]
    first = 0 if output is not None else channels - gates.shape[2] // 4
    tile = {"CHANNELS": 16, "DEPTH": 16} if x.dtype == torch.float64 else {"CHANNELS": 16, "DEPTH": 32}

    def programs(tile):
        return frames * triton.cdiv(height * width, tile["PIXELS"]) * triton.cdiv(channels - first, tile["CHANNELS"])

    launch(conv_lstm_1x1_step_kernel, programs)(
        x, h, c, weight, bias, reset, output, c_next, gates, cells, inputs, channels,
        kept_channels(channels), height * width, first,
        **constants(x, order, precision), **tile,
    )  # fmt: skip


def parameters(
    weight: Tensor, bias: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As the kernels read them: the weight as a matrix, the mask as bytes."""
    return (
        weight.flatten(1).contiguous(),
        None if bias is None else bias.contiguous(),
        None if reset is None else reset.contiguous().view(torch.uint8),
    )


def is_resident(x: Tensor, channels: int) -> bool:
    """Whether factors have 16 bits and the weights of all gates take at most 64 KiB of shared memory.

    The number of steps has no say: a sequence has the bits of as many calls of one step. Not for float32: its products
    on the matrix units spill registers over the whole sequence, and without them the products take longer than memory.
    """
    return x.element_size() == 2 and (side(x.shape[1]) + side(channels)) * 4 * side(channels) * 2 <= 64 << 10


def constants(x: Tensor, order: str, precision: str) -> dict:
    """`precision` is how the matrix units multiply float32, in the words of torch.set_float32_matmul_precision."""
    products = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}
    return {
        **{name.upper(): order.index(name) for name in "ifgo"},
        "DTYPE": arithmetic_dtype(x),
        "FACTOR": factor_dtype(x),
        "PRECISION": products[precision] if x.dtype == torch.float32 else "ieee",
        "NARROW": x.element_size() == 2,
        "INTERLEAVED": common_layout(x) is torch.channels_last,
    }


def side(size: int) -> int:
    """The smallest side of a tile that holds `size`: a power of two, at least the 16 of the matrix units."""
    return max(triton.next_power_of_2(size), 16)
