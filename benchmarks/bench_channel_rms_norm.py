"""channel_rms_norm against plain PyTorch at the maps of VisionCore's stages, frames as further rows, and of encoders.

Floor: x is read and y written; the gradient reads x and the gradient of y and writes that of x.
"""

import torch
import torch.nn.functional as F

from benchmarks.registry import Benchmark, Competitor
from evkernels import ops
from evkernels.testing import tensor

# (samples, channels, frames x height, width)
SHAPES = ((4, 64, 5 * 27, 27), (4, 128, 5 * 14, 14), (4, 256, 5 * 7, 7), (1, 16, 260, 346), (8, 128, 32, 32))


def eager(x, weight, bias):
    normal = x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5)
    return normal * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)


def library(x, weight, bias):
    """PyTorch's own norm, of rows: in place in channels_last."""
    return (F.rms_norm(x.movedim(1, -1), x.shape[1:2], weight, 1e-5) + bias).movedim(-1, 1)


def inputs(shape, dtype):
    channels = shape[1]
    parameters = 1 + tensor(channels, dtype=dtype, seed=2) / 4, tensor(channels, dtype=dtype, seed=3)
    return tensor(*shape, dtype=dtype, seed=1), *parameters


def floor_bytes(shape, itemsize, mode):
    n, c, height, width = shape
    return itemsize * n * c * height * width * (2 + 3 * (mode == "forward+backward"))


BENCHMARKS = (
    Benchmark(
        op="channel_rms_norm",
        function=ops.channel_rms_norm,
        eager=eager,
        inputs=inputs,
        shapes=SHAPES,
        gate_shapes=SHAPES[:2],
        tiny_shape=(1, 5, 6, 7),
        floor_bytes=floor_bytes,
        competitors=(Competitor("F.rms_norm", lambda: library),),
    ),
)
