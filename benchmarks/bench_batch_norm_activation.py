"""batch_norm_activation against plain PyTorch: the norms and GELUs of EfficientConvLSTM's head and decoder in training.

Floor: the forward reads x twice, since the statistics come before the outputs, and writes y; the gradient reads x and
the gradient of y twice and writes that of x. Behind a projection y and its gradient are next to nothing.
"""

import torch
import torch.nn.functional as F

from benchmarks.registry import Benchmark
from evkernels import ops
from evkernels.testing import tensor

# (samples, channels, height, width, whether the head's projection to one map follows)
SHAPES = (
    (1, 32, 260, 346, True),
    (1, 32, 260, 346, False),
    (1, 8, 260, 346, False),
    (1, 32, 65, 87, False),
    (8, 64, 33, 44, False),
)


def eager(x, weight, bias, projection):
    y = F.gelu(F.batch_norm(x, None, None, weight, bias, training=True))
    return y if projection is None else F.conv2d(y, projection.view(1, -1, 1, 1))


def fused(x, weight, bias, projection):
    return ops.batch_norm_activation(x, weight, bias, projection, "gelu")[0]


def inputs(shape, dtype):
    *size, projected = shape
    weight, bias, projection = (tensor(size[1], dtype=dtype, seed=seed) for seed in (2, 3, 4))
    return tensor(*size, dtype=dtype, seed=1), 1 + weight / 4, bias, projection if projected else None


def floor_bytes(shape, itemsize, mode):
    forward, backward = (2, 3) if shape[-1] else (3, 5)
    return itemsize * items(shape) * (forward + backward * (mode == "forward+backward"))


def items(shape):
    n, c, height, width, _ = shape
    return n * c * height * width


def label(shape):
    *size, projected = shape
    return "x".join(str(value) for value in size) + (" to one map" if projected else "")


BENCHMARKS = (
    Benchmark(
        op="batch_norm_activation",
        function=fused,
        eager=eager,
        inputs=inputs,
        shapes=SHAPES,
        gate_shapes=SHAPES[:3],
        tiny_shape=(1, 5, 6, 7, True),
        floor_bytes=floor_bytes,
        items=items,
        label=label,
        dtypes=(torch.float32, torch.bfloat16),
        gate_dtypes=(torch.float32,),
        modes=("forward+backward",),
        # Other layouts are copied first: the layers take it for this one alone.
        layouts=("channels_last",),
    ),
)
