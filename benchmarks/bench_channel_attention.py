"""channel_attention against plain PyTorch: the maps of EfficientConvLSTM's encoder in training.

Floor: the forward reads x twice, for the means come before the outputs, and writes y; the gradient reads x once, the
gradient of y twice, and writes that of x.
"""

import torch
import torch.nn.functional as F

from benchmarks.registry import Benchmark
from evkernels import ops
from evkernels.testing import tensor

# (samples, channels, height, width)
SHAPES = ((1, 16, 260, 346), (1, 32, 130, 173), (1, 64, 65, 87), (8, 128, 33, 44))


def eager(x, reduce_weight, expand_weight):
    means = x.mean((2, 3), keepdim=True)
    return x * F.conv2d(F.gelu(F.conv2d(means, reduce_weight)), expand_weight).sigmoid()


def inputs(shape, dtype):
    channels = shape[1]
    weights = (
        tensor(*size, 1, 1, dtype=dtype) for size in ((channels // 8 or 1, channels), (channels, channels // 8 or 1))
    )
    return tensor(*shape, dtype=dtype, seed=1), *weights


def floor_bytes(shape, itemsize, mode):
    return itemsize * torch.Size(shape).numel() * (3 + 4 * (mode == "forward+backward"))


BENCHMARKS = (
    Benchmark(
        op="channel_attention",
        function=ops.channel_attention,
        eager=eager,
        inputs=inputs,
        shapes=SHAPES,
        gate_shapes=SHAPES[:2],
        tiny_shape=(1, 5, 6, 7),
        floor_bytes=floor_bytes,
        dtypes=(torch.float32, torch.bfloat16),
        gate_dtypes=(torch.float32,),
        modes=("forward+backward",),
        # Other layouts are copied first: the layer takes it for this one alone.
        layouts=("channels_last",),
    ),
)
