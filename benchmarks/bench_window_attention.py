"""window_attention against plain PyTorch, which copies a map into partitions, at the stages of RVT-T and RVT-S.

Partitions are 6x10 pixels. Floor: forward reads qkv and writes a third as much; the gradient reads qkv and the result's
gradient and writes that of qkv. What limits is the products: two forward, and seven with the gradient, which forms the
scores again.
"""

import torch.nn.functional as F

from benchmarks.registry import Benchmark
from evkernels import ops
from evkernels.testing import tensor

WINDOW = (6, 10)
# (samples, height, width, heads, channels of a head, kind of partition)
SHAPES = (
    (1, 96, 160, 1, 32, "window"),
    (1, 96, 160, 1, 32, "grid"),
    (5, 12, 20, 8, 32, "window"),
    (1, 96, 160, 2, 24, "grid"),
)


def eager(qkv, bias, heads, window, partition):
    n, height, width, channels = qkv.shape
    (rows, columns), grid = window, partition == "grid"
    down, across = (rows, columns) if grid else (height // rows, width // columns)
    x = qkv.view(n, down, height // down, across, width // across, heads, channels // heads)
    q, k, v = x.permute((0, 2, 4, 5, 1, 3, 6) if grid else (0, 1, 3, 5, 2, 4, 6)).flatten(4, 5).chunk(3, dim=-1)
    y = F.scaled_dot_product_attention(q, k, v).unflatten(4, (rows, columns))
    y = y.permute((0, 4, 1, 5, 2, 3, 6) if grid else (0, 1, 4, 2, 5, 3, 6))
    return y.reshape(n, height, width, channels // 3)


def inputs(shape, dtype):
    n, height, width, heads, dim, partition = shape
    return tensor(n, height, width, 3 * heads * dim, dtype=dtype), None, heads, WINDOW, partition


def floor_bytes(shape, itemsize, mode):
    n, height, width, heads, dim, _ = shape
    return itemsize * n * height * width * heads * dim * (4 + 7 if mode == "forward+backward" else 4)


def floor_flops(shape, mode):
    n, height, width, heads, dim, _ = shape
    products = 2 * WINDOW[0] * WINDOW[1] * n * height * width * heads * dim
    return products * (7 if mode == "forward+backward" else 2)


def label(shape):
    n, height, width, heads, dim, partition = shape
    return f"{n}x{width}x{height} {heads} heads of {dim} {partition}"


BENCHMARKS = (
    Benchmark(
        op="window_attention",
        function=ops.window_attention,
        eager=eager,
        inputs=inputs,
        shapes=SHAPES,
        gate_shapes=SHAPES[1:3],
        tiny_shape=(1, 12, 10, 2, 3, "grid"),
        floor_bytes=floor_bytes,
        floor_flops=floor_flops,
        items=lambda shape: shape[0] * shape[1] * shape[2],
        item="pixel",
        label=label,
        layouts=("contiguous",),
    ),
)
