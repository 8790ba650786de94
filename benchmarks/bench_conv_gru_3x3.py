"""conv_gru_3x3 against plain PyTorch: ten steps of two samples, and one step of FireNet's cell.

Floor: forward reads x and the weights and writes the output; the gradient reads x, the output and its gradient and
writes that of x. States between steps, weights and what training keeps are not counted. Operations are those of
Winograd's F(2x2, 3x3), 16 products for four pixels instead of 36; the gradient has twice the products of the forward.
"""

import torch
import torch.nn.functional as F

from benchmarks.bench_conv_lstm_3x3 import floor_bytes, label
from benchmarks.registry import Benchmark
from evkernels import ops
from evkernels.testing import tensor

# (steps, samples, channels of x and h, height, width)
SHAPES = ((1, 1, 16, 180, 240), (10, 2, 64, 45, 80), (10, 2, 256, 23, 40))


def eager(frames, h, *parameters):
    def conv(gate, x):
        return F.conv2d(x, parameters[2 * gate], parameters[2 * gate + 1], padding=1)

    output = []
    for frame in frames.split(len(h)):
        xh = torch.cat([frame, h], dim=1)
        z, r = conv(0, xh).sigmoid(), conv(1, xh).sigmoid()
        h = (1 - z) * h + z * conv(2, torch.cat([frame, r * h], dim=1)).tanh()
        output.append(h)
    return torch.stack(output)


def fused(frames, h, *parameters):
    return ops.conv_gru_3x3(frames.unflatten(0, (-1, len(h))), h, *parameters)


def inputs(shape, dtype):
    steps, n, channels, height, width = shape
    parameters = []
    for seed in (3, 5, 7):
        parameters.append(tensor(channels, 2 * channels, 3, 3, dtype=dtype, seed=seed) * (18 * channels) ** -0.5)
        parameters.append(tensor(channels, dtype=dtype, seed=seed + 1))
    return (
        tensor(steps * n, channels, height, width, dtype=dtype, seed=1),
        tensor(n, channels, height, width, dtype=dtype, seed=2),
        *parameters,
    )


def floor_flops(shape, mode):
    winograd = 2 * torch.Size(shape).numel() * 4 * 6 * shape[2]
    return winograd * (3 if mode == "forward+backward" else 1)


BENCHMARKS = (
    Benchmark(
        op="conv_gru_3x3",
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
