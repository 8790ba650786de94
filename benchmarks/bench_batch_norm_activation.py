"""batch_norm_activation against plain PyTorch: the norms and GELUs of EfficientConvLSTM's head and decoder in training.

Floor: the forward reads x twice, since the statistics come before the outputs, and writes y; the gradient reads x and
the gradient of y twice and writes that of x.
"""

import torch
import torch.nn.functional as F

from benchmarks.registry import Benchmark
from evkernels import ops
from evkernels.testing import tensor

# (samples, channels, height, width)
SHAPES = ((1, 32, 260, 346), (1, 8, 260, 346), (1, 32, 65, 87), (8, 64, 33, 44))


def eager(x, weight, bias):
    return F.gelu(F.batch_norm(x, None, None, weight, bias, training=True))


def fused(x, weight, bias):
    return ops.batch_norm_activation(x, weight, bias, "gelu")[0]


def inputs(shape, dtype):
    channels = shape[1]
    parameters = 1 + tensor(channels, dtype=dtype, seed=2) / 4, tensor(channels, dtype=dtype, seed=3)
    return tensor(*shape, dtype=dtype, seed=1), *parameters


def floor_bytes(shape, itemsize, mode):
    n, c, height, width = shape
    return itemsize * n * c * height * width * (3 + 5 * (mode == "forward+backward"))


def items(shape):
    n, c, height, width = shape
    return n * c * height * width


BENCHMARKS = (
    Benchmark(
        op="batch_norm_activation",
        function=fused,
        eager=eager,
        inputs=inputs,
        shapes=SHAPES,
        gate_shapes=SHAPES[:2],
        tiny_shape=(1, 5, 6, 7),
        floor_bytes=floor_bytes,
        items=items,
        dtypes=(torch.float32, torch.bfloat16),
        gate_dtypes=(torch.float32,),
        modes=("forward+backward",),
        # Other layouts are copied first: the layers take it for this one alone.
        layouts=("channels_last",),
    ),
)
