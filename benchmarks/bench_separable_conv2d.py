"""separable_conv2d against plain PyTorch at the blocks of a small event encoder.

Each block is a depthwise 3 x 3 convolution with bias, SiLU, a pointwise convolution with bias and SiLU. Floor: forward
reads x and writes y; the gradient reads x and the gradient of y and writes that of x. Weights are few. The gradient has
twice the products of the forward, whose recomputation is not counted.
"""

import torch
import torch.nn.functional as F

from benchmarks.registry import Benchmark
from evkernels import ops
from evkernels.testing import tensor

HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
# (samples, input channels, output channels, height, width, stride)
BLOCKS = (
    (1, 16, 32, 260, 346, 2),
    (1, 32, 64, 130, 173, 2),
    (1, 64, 128, 65, 87, 2),
    (1, 128, 256, 33, 44, 2),
    (1, 64, 64, 65, 87, 1),
    (1, 128, 128, 33, 44, 1),
    (1, 256, 256, 17, 22, 1),
)


def eager(x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, stride):
    a = F.silu(F.conv2d(x, depthwise_weight, depthwise_bias, stride, 1, groups=x.shape[1]))
    return F.silu(F.conv2d(a, pointwise_weight, pointwise_bias))


def fused(x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, stride):
    parameters = (depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias)
    return ops.separable_conv2d(x, *parameters, stride, 1, "silu", "silu")


def inputs(shape, dtype):
    n, c, o, height, width, stride = shape
    return (
        tensor(n, c, height, width, dtype=dtype, seed=1),
        tensor(c, 1, 3, 3, dtype=dtype, seed=2) / 3,
        tensor(o, c, 1, 1, dtype=dtype, seed=3) * c**-0.5,
        tensor(c, dtype=dtype, seed=4),
        tensor(o, dtype=dtype, seed=5),
        stride,
    )


def output_pixels(shape):
    n, _, _, height, width, stride = shape
    return n * ((height - 1) // stride + 1) * ((width - 1) // stride + 1)


def floor_bytes(shape, itemsize, mode):
    n, c, o, height, width, _ = shape
    x, y = n * c * height * width, o * output_pixels(shape)
    return itemsize * (x + y + (2 * x + y if mode == "forward+backward" else 0))


def floor_flops(shape, mode):
    _, c, o, *_ = shape
    return 2 * output_pixels(shape) * c * (9 + o) * (3 if mode == "forward+backward" else 1)


def label(shape):
    _, c, o, height, width, stride = shape
    return f"{c}-{o} {height}x{width}/{stride}"


BENCHMARKS = (
    Benchmark(
        op="separable_conv2d",
        function=fused,
        eager=eager,
        inputs=inputs,
        shapes=BLOCKS,
        # Without AVX-512 the stride-2 block trains on contiguous maps 0.9 to 1.1 times as fast as in eager PyTorch.
        gate_shapes=(*[(1, 64, 128, 65, 87, 2)] * HAS_AVX512, (1, 64, 64, 65, 87, 1)),
        tiny_shape=(1, 5, 7, 6, 9, 2),
        floor_bytes=floor_bytes,
        floor_flops=floor_flops,
        items=lambda shape: shape[2] * output_pixels(shape),
        label=label,
        dtypes=(torch.float32, torch.bfloat16),
        gate_dtypes=(torch.float32,),
        # Training the stride-2 block is level with eager channels_last on some processors.
        gate_modes=("inference", "forward"),
    ),
)
