"""conv_lstm_3x3 against plain PyTorch, five steps of a sample and ten of two.

Floor: forward reads x and the weights and writes the output; the gradient reads x, the output and its gradient and
writes that of x. States between steps, weights and what training keeps are not counted. Operations are those of
Winograd's F(2x2, 3x3), 16 products for four pixels instead of 36; the gradient has twice the products of the forward.
"""

import torch
import torch.nn.functional as F

from benchmarks.registry import Benchmark
from evkernels import ops
from evkernels.testing import tensor

# (steps, samples, channels of x and h, height, width)
SHAPES = ((5, 1, 64, 33, 44), (5, 1, 8, 130, 173), (10, 2, 64, 45, 80), (10, 2, 256, 23, 40))


def eager(frames, h, c, weight, bias):
    output = []
    for frame in frames.split(len(h)):
        i, f, g, o = F.conv2d(torch.cat([frame, h], dim=1), weight, bias, padding=1).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        output.append(h)
    return torch.stack(output), c


def fused(frames, h, c, weight, bias):
    return ops.conv_lstm_3x3(frames.unflatten(0, (-1, len(h))), h, c, weight, bias)


def inputs(shape, dtype):
    steps, n, channels, height, width = shape
    return (
        tensor(steps * n, channels, height, width, dtype=dtype, seed=1),
        tensor(n, channels, height, width, dtype=dtype, seed=2),
        tensor(n, channels, height, width, dtype=dtype, seed=3),
        tensor(4 * channels, 2 * channels, 3, 3, dtype=dtype, seed=4) * (18 * channels) ** -0.5,
        tensor(4 * channels, dtype=dtype, seed=5),
    )


def floor_bytes(shape, itemsize, mode):
    return torch.Size(shape).numel() * itemsize * (6 if mode == "forward+backward" else 2)


def floor_flops(shape, mode):
    winograd = 2 * torch.Size(shape).numel() * 4 * 8 * shape[2]
    return winograd * (3 if mode == "forward+backward" else 1)


def label(shape):
    steps, n, channels, height, width = shape
    return f"T{steps} {n}x{channels}x{height}x{width}"


BENCHMARKS = (
    Benchmark(
        op="conv_lstm_3x3",
        function=fused,
        eager=eager,
        inputs=inputs,
        shapes=SHAPES,
        gate_shapes=SHAPES[:1],
        times_eager=4,
        tiny_shape=(2, 2, 5, 3, 7),
        floor_bytes=floor_bytes,
        floor_flops=floor_flops,
        label=label,
        dtypes=(torch.float32,),
        modes=("inference", "forward+backward"),
    ),
)
