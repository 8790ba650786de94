"""A 3x3 convolution with residual and ReLU, as in a residual block, against PyTorch's library and operators in place.

In inference and channels_last, ours is one op by Winograd's F(2x2, 3x3), weights transformed in every call; contiguous
maps it leaves to the library. Floor: x, which is the residual too, and the weights are read and the result written;
operations are Winograd's, 16 products for four pixels instead of 36.
"""

import torch
import torch.nn.functional as F

from benchmarks.registry import Benchmark
from evkernels.ops.conv_3x3 import activated_convolution_3x3
from evkernels.testing import tensor

# (samples, channels, height, width)
SHAPES = ((1, 16, 180, 240), (1, 32, 65, 87), (1, 64, 90, 160), (1, 128, 45, 80), (1, 256, 23, 30))


def fused(x, weight, bias):
    return activated_convolution_3x3(x, weight, bias, "relu", residual=x)


def eager(x, weight, bias):
    return F.relu(F.conv2d(x, weight, bias, padding=1).add_(x), inplace=True)


def inputs(shape, dtype):
    channels = shape[1]
    weight = tensor(channels, channels, 3, 3, dtype=dtype, seed=1) * (9 * channels) ** -0.5
    return tensor(*shape, dtype=dtype), weight, tensor(channels, dtype=dtype, seed=2)


def floor_bytes(shape, itemsize, mode):
    return itemsize * (2 * torch.Size(shape).numel() + 9 * shape[1] ** 2)


def floor_flops(shape, mode):
    return 2 * torch.Size(shape).numel() * 4 * shape[1]


def label(shape):
    return "x".join(str(size) for size in shape)


BENCHMARKS = (
    Benchmark(
        op="convolution",
        function=fused,
        eager=eager,
        inputs=inputs,
        shapes=SHAPES,
        # No gates: with AVX-512 it has not been measured.
        gate_shapes=(),
        times_eager=4,
        tiny_shape=(2, 16, 14, 13),
        floor_bytes=floor_bytes,
        floor_flops=floor_flops,
        label=label,
        dtypes=(torch.float32,),
        modes=("inference",),
    ),
)
