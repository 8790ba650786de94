"""conv_lstm_1x1 against plain PyTorch at RVT's stages for the Gen1 (240x304) and 1 Mpx (halved) cameras, ten steps.

Floor: forward reads x and the weights and writes the output; the gradient reads x, the output and its gradient and
writes that of x. States between steps, weights and what training keeps are not counted. The gradient has twice the
products of the forward, whose recomputation is not counted.
"""

import torch
import torch.nn.functional as F

from benchmarks.registry import Benchmark, Competitor
from evkernels import ops
from evkernels.testing import tensor

# (steps, samples, channels of x and h, height, width)
STAGES = (
    (10, 1, 64, 60, 76),
    (10, 1, 256, 15, 19),
    (10, 2, 64, 90, 160),
    (10, 2, 128, 45, 80),
    (10, 2, 256, 23, 40),
)


def eager(frames, h, c, weight, bias):
    output = []
    for frame in frames.split(len(h)):
        i, f, g, o = F.conv2d(torch.cat([frame, h], dim=1), weight, bias).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        output.append(h)
    return torch.stack(output), c


def fused(frames, h, c, weight, bias):
    return ops.conv_lstm_1x1(frames.unflatten(0, (-1, len(h))), h, c, weight, bias)


def in_high_precision(function):
    """`function` with float32 products as `torch.set_float32_matmul_precision("high")` allows them."""

    def call(*arguments):
        previous = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        result = function(*arguments)
        torch.set_float32_matmul_precision(previous)
        return result

    return call


def two_parts(value):
    """float32 as the sum of two bfloat16."""
    high = value.bfloat16().float()
    return high + (value - high).bfloat16().float()


def eager_in_two_parts(frames, h, c, weight, bias):
    output = []
    for frame in two_parts(frames).split(len(h)):
        h, c = eager(frame, two_parts(h), c, two_parts(weight), bias)
        h = h[0]
        output.append(h)
    return torch.stack(output), c


def load_cudnn():
    if not torch.cuda.is_available():
        raise ImportError("cuDNN is for CUDA devices")
    return lstm


def lstm(module, frames, h, c, shape):
    """torch.nn.LSTM over the pixels: the same cell where the kernels are 1x1."""
    output, (_, c) = module(frames, (h, c))
    return output.unflatten(1, shape).movedim(-1, 2), c[0].unflatten(0, shape).movedim(-1, 1)


def prepare_lstm(arguments):
    frames, h, c, weight, bias = arguments
    n, channels, height, width = h.shape
    module = torch.nn.LSTM(channels, channels).to(h.device, h.dtype).requires_grad_(False)
    for parameter, value in zip(
        module.parameters(), (*weight.flatten(1).split(channels, dim=1), bias, torch.zeros_like(bias)), strict=True
    ):
        parameter.copy_(value)
    pixels = [value.movedim(1, -1).reshape(-1, n * height * width, channels) for value in (frames, h, c)]
    return module, *pixels, (n, height, width)


def inputs(shape, dtype):
    steps, n, channels, height, width = shape
    return (
        tensor(steps * n, channels, height, width, dtype=dtype, seed=1),
        tensor(n, channels, height, width, dtype=dtype, seed=2),
        tensor(n, channels, height, width, dtype=dtype, seed=3),
        tensor(4 * channels, 2 * channels, 1, 1, dtype=dtype, seed=4) * (2 * channels) ** -0.5,
        tensor(4 * channels, dtype=dtype, seed=5),
    )


def floor_bytes(shape, itemsize, mode):
    return torch.Size(shape).numel() * itemsize * (6 if mode == "forward+backward" else 2)


def floor_flops(shape, mode):
    return 2 * torch.Size(shape).numel() * 8 * shape[2] * (3 if mode == "forward+backward" else 1)


def label(shape):
    steps, n, channels, height, width = shape
    return f"T{steps} {n}x{channels}x{height}x{width}"


BENCHMARKS = (
    Benchmark(
        op="conv_lstm_1x1",
        function=fused,
        eager=eager,
        inputs=inputs,
        shapes=STAGES,
        gate_shapes=STAGES[:2],
        tiny_shape=(2, 2, 5, 3, 7),
        floor_bytes=floor_bytes,
        floor_flops=floor_flops,
        label=label,
        competitors=(Competitor("nn.LSTM", load_cudnn, modes=("inference",), prepare=prepare_lstm),),
        modes=("inference", "forward+backward"),
        gate_dtypes=(torch.float32,),
    ),
    Benchmark(
        op="conv_lstm_1x1_high",
        function=in_high_precision(fused),
        eager=in_high_precision(eager),
        rounded=eager_in_two_parts,
        inputs=inputs,
        shapes=(STAGES[1], STAGES[2], STAGES[4]),
        gate_shapes=STAGES[1:2],
        tiny_shape=(2, 2, 5, 3, 7),
        floor_bytes=floor_bytes,
        floor_flops=floor_flops,
        label=label,
        dtypes=(torch.float32,),
        # The gradient's products would follow the switch at its own time in plain PyTorch.
        modes=("inference",),
    ),
)
