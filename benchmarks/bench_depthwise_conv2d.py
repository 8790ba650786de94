"""depthwise_conv2d against plain PyTorch at the depthwise layers of a small event encoder, with bias and SiLU.

Floor: forward reads x and writes y; the gradient reads x and the gradient of y and writes that of x. The operations
of the taps are few beside those bytes: 2 * k * k per output element, three times that with the gradient.
"""

import torch
import torch.nn.functional as F

from benchmarks.registry import Benchmark
from evkernels import ops
from evkernels.testing import tensor

# (samples, channels, height, width, k, stride)
LAYERS = (
    (1, 16, 260, 346, 3, 1),
    (1, 16, 260, 346, 3, 2),
    (1, 32, 130, 173, 3, 2),
    (1, 64, 65, 87, 3, 1),
    (1, 128, 33, 44, 3, 1),
    (1, 256, 17, 22, 3, 1),
    (1, 64, 65, 87, 5, 1),
)


def eager(x, weight, bias, stride):
    return F.silu(F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=x.shape[1]))


def fused(x, weight, bias, stride):
    return ops.depthwise_conv2d(x, weight, bias, stride, activation="silu")


def inputs(shape, dtype):
    n, c, height, width, k, stride = shape
    x = tensor(n, c, height, width, dtype=dtype, seed=1)
    return x, tensor(c, 1, k, k, dtype=dtype, seed=2) / k, tensor(c, dtype=dtype, seed=3), stride


def output_elements(shape):
    n, c, height, width, _, stride = shape
    return n * c * ((height - 1) // stride + 1) * ((width - 1) // stride + 1)


def floor_bytes(shape, itemsize, mode):
    x, y = torch.Size(shape[:4]).numel(), output_elements(shape)
    return itemsize * (x + y + (2 * x + y if mode == "forward+backward" else 0))


def floor_flops(shape, mode):
    return 2 * shape[4] ** 2 * output_elements(shape) * (3 if mode == "forward+backward" else 1)


def label(shape):
    _, c, height, width, k, stride = shape
    return f"{c} {height}x{width} k{k}/{stride}"


BENCHMARKS = (
    Benchmark(
        op="depthwise_conv2d",
        function=fused,
        eager=eager,
        inputs=inputs,
        shapes=LAYERS,
        gate_shapes=((1, 64, 65, 87, 5, 1),),
        tiny_shape=(1, 5, 6, 9, 3, 2),
        floor_bytes=floor_bytes,
        floor_flops=floor_flops,
        items=output_elements,
        label=label,
        gate_dtypes=(torch.float32,),
    ),
)
