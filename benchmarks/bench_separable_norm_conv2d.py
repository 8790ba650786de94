"""separable_norm_conv2d against plain PyTorch: the training step of a small event encoder's blocks, with batch norms.

Each block is a depthwise 3 x 3 convolution, batch norm, GELU, a pointwise convolution, batch norm and GELU. Floor: the
forward reads x twice, since the first norm needs its statistics before its outputs, writes the pointwise result, reads
it and writes y; the gradient reads x three times, the pointwise result and the gradient of y twice, writes, reads and
writes again the gradient at the depthwise result and writes that of x. Both directions have three products.
"""

import torch
import torch.nn.functional as F

from benchmarks.bench_separable_conv2d import BLOCKS, label, output_pixels
from benchmarks.registry import Benchmark
from evkernels import ops
from evkernels.testing import tensor


def eager(
    x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, norm_weight, norm_bias, output_norm_weight,
    output_norm_bias, stride,
):  # fmt: skip
    d = F.conv2d(x, depthwise_weight, depthwise_bias, stride, 1, groups=x.shape[1])
    a = F.gelu(F.batch_norm(d, None, None, norm_weight, norm_bias, training=True))
    p = F.conv2d(a, pointwise_weight, pointwise_bias)
    return F.gelu(F.batch_norm(p, None, None, output_norm_weight, output_norm_bias, training=True))


def fused(*arguments):
    *tensors, stride = arguments
    return ops.separable_norm_conv2d(*tensors, None, stride, 1, "gelu", "gelu")[0]


def inputs(shape, dtype):
    n, c, o, height, width, stride = shape
    return (
        tensor(n, c, height, width, dtype=dtype, seed=1),
        tensor(c, 1, 3, 3, dtype=dtype, seed=2) / 3,
        tensor(o, c, 1, 1, dtype=dtype, seed=3) * c**-0.5,
        tensor(c, dtype=dtype, seed=4),
        tensor(o, dtype=dtype, seed=5),
        1 + tensor(c, dtype=dtype, seed=6) / 4,
        tensor(c, dtype=dtype, seed=7),
        1 + tensor(o, dtype=dtype, seed=8) / 4,
        tensor(o, dtype=dtype, seed=9),
        stride,
    )


def floor_bytes(shape, itemsize, mode):
    n, c, o, height, width, _ = shape
    x, d, y = n * c * height * width, c * output_pixels(shape), o * output_pixels(shape)
    return itemsize * (2 * x + 3 * y + (3 * x + 3 * d + 4 * y + x if mode == "forward+backward" else 0))


def floor_flops(shape, mode):
    _, c, o, *_ = shape
    return 2 * output_pixels(shape) * c * (9 + o) * (3 if mode == "forward+backward" else 1)


BENCHMARKS = (
    Benchmark(
        op="separable_norm_conv2d",
        function=fused,
        eager=eager,
        inputs=inputs,
        shapes=BLOCKS,
        gate_shapes=((1, 16, 32, 260, 346, 2), (1, 64, 64, 65, 87, 1)),
        tiny_shape=(1, 5, 7, 6, 9, 2),
        floor_bytes=floor_bytes,
        floor_flops=floor_flops,
        items=lambda shape: shape[2] * output_pixels(shape),
        label=label,
        dtypes=(torch.float32, torch.bfloat16),
        gate_dtypes=(torch.float32,),
        modes=("forward+backward",),
        # Other layouts are copied first, which costs what the op saves: nn.SeparableBlock takes it for this one alone.
        layouts=("channels_last",),
    ),
)
