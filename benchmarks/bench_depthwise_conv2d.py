"""depthwise_conv2d against plain PyTorch at the maps of event-camera encoders, with and without an activation.

Floor: forward reads x and writes y; the gradient reads x and y's gradient and writes x's. Multiplications: k * k for
each output, as many again for each of the two gradients, and once more where the pre-activation is recomputed. A shape
is [N, C, H, W], k, stride and activation.
"""

import torch.nn.functional as F

from benchmarks.registry import Benchmark, Competitor
from evkernels import ops
from evkernels.testing import tensor

ACTIVATIONS = {"none": lambda y: y, "silu": F.silu}


def eager(x, weight, bias, stride, activation):
    return ACTIVATIONS[activation](F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=x.shape[1]))


def eager_in_place(x, weight, bias, stride, activation):
    y = F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=x.shape[1])
    return y if activation == "none" else F.silu(y, inplace=True)


def fused(x, weight, bias, stride, activation):
    return ops.depthwise_conv2d(x, weight, bias, stride, activation=activation)


def inputs(shape, dtype):
    (n, c, height, width), k, stride, activation = shape
    x, weight = tensor(n, c, height, width, dtype=dtype, seed=1), tensor(c, 1, k, k, dtype=dtype, seed=2) / k
    return x, weight, tensor(c, dtype=dtype, seed=3), stride, activation


def elements(shape):
    """Of the input and of the output."""
    (n, c, height, width), _, stride, _ = shape
    return n * c * height * width, n * c * -(-height // stride) * -(-width // stride)


def floor_bytes(shape, itemsize, mode):
    read, written = elements(shape)
    return itemsize * (3 * read + 2 * written if mode == "forward+backward" else read + written)


def floor_flops(shape, mode):
    _, k, _, activation = shape
    passes = (3 if activation == "none" else 4) if mode == "forward+backward" else 1
    return 2 * k * k * passes * elements(shape)[1]


def label(shape):
    size, k, stride, activation = shape
    return f"{'x'.join(map(str, size))} k{k} s{stride}" + (f" {activation}" if activation != "none" else "")


BENCHMARKS = (
    Benchmark(
        op="depthwise_conv2d",
        function=fused,
        eager=eager,
        inputs=inputs,
        shapes=(
            ((1, 16, 260, 346), 3, 1, "none"),
            ((1, 16, 260, 346), 3, 1, "silu"),
            ((1, 16, 260, 346), 3, 2, "none"),
            ((1, 16, 260, 346), 3, 2, "silu"),
            ((1, 32, 130, 173), 3, 2, "silu"),
            ((1, 64, 65, 87), 3, 1, "none"),
            ((1, 64, 65, 87), 3, 1, "silu"),
            ((1, 64, 65, 87), 5, 1, "none"),
            ((1, 64, 65, 87), 5, 1, "silu"),
            ((1, 128, 33, 44), 3, 1, "silu"),
            ((1, 256, 17, 22), 3, 1, "silu"),
        ),
        gate_shapes=(((1, 16, 260, 346), 3, 1, "silu"),),
        tiny_shape=((1, 5, 7, 9), 3, 2, "silu"),
        floor_bytes=floor_bytes,
        floor_flops=floor_flops,
        items=lambda shape: elements(shape)[1],
        item="output",
        label=label,
        competitors=(Competitor("eager in-place", lambda: eager_in_place, modes=("inference",)),),
    ),
)
