"""residual_mlp against plain PyTorch at the stages of RVT-T and the first of RVT-S.

Floor: x is read and y written, weights read once. What limits is the two products. Inference alone: the gradient is
PyTorch's own.
"""

import torch
import torch.nn.functional as F

from benchmarks.registry import Benchmark, Competitor
from evkernels import ops
from evkernels.testing import tensor

# (pixels, channels); the hidden layer has four times as many.
SHAPES = ((15360, 32), (7680, 64), (3840, 128), (1200, 256), (15360, 48))


def eager(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, scale):
    hidden = F.gelu(F.linear(F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias), weight1, bias1))
    return x + scale * F.linear(hidden, weight2, bias2)


def eager_in_place(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, scale):
    hidden = F.linear(F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias), weight1, bias1)
    return F.linear(torch.ops.aten.gelu_(hidden), weight2, bias2).mul_(scale).add_(x)


def inputs(shape, dtype):
    pixels, channels = shape
    sizes = [(channels,), (channels,), (4 * channels, channels), (4 * channels,), (channels, 4 * channels)]
    sizes += [(channels,), (channels,)]
    parameters = [tensor(*size, dtype=dtype, seed=2 + k) * size[-1] ** -0.5 for k, size in enumerate(sizes)]
    return tensor(pixels, channels, dtype=dtype, seed=1), *parameters


def floor_bytes(shape, itemsize, mode):
    pixels, channels = shape
    return itemsize * (2 * pixels * channels + 8 * channels**2)


def floor_flops(shape, mode):
    pixels, channels = shape
    return 16 * pixels * channels**2


BENCHMARKS = (
    Benchmark(
        op="residual_mlp",
        function=ops.residual_mlp,
        eager=eager,
        inputs=inputs,
        shapes=SHAPES,
        gate_shapes=SHAPES[:2],
        tiny_shape=(65, 5),
        floor_bytes=floor_bytes,
        floor_flops=floor_flops,
        items=lambda shape: shape[0],
        item="pixel",
        dtypes=(torch.float32,),
        modes=("inference",),
        layouts=("contiguous",),
        competitors=(Competitor("eager in-place", lambda: eager_in_place, modes=("inference",)),),
    ),
)
