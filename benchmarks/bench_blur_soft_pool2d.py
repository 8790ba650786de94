"""blur_soft_pool2d against plain PyTorch at the maps behind VisionCore's stages, frames as further channels.

Floor: forward reads x and writes y, a quarter of it; the gradient reads x and the gradient of y and writes that of x.
What limits is the exponentials, five for each output. Plain PyTorch is written to be as stable: the largest exponent of
a window is taken out.
"""

import torch
import torch.nn.functional as F

from benchmarks.registry import Benchmark, Competitor
from evkernels import ops
from evkernels.testing import tensor

SHAPES = ((4, 512, 26, 26), (4, 1024, 13, 13), (1, 64, 128, 128))


def blurred(x):
    line = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype, device=x.device)
    return F.conv2d(x, (line[:, None] * line / 16).expand(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1])


def eager(x):
    y = blurred(x)
    height, width = (size - 1 for size in x.shape[2:])
    values = torch.stack([y[:, :, i : i + height : 2, j : j + width : 2] for i in (0, 1) for j in (0, 1)])
    total = values.logsumexp(0)
    return ((values - total).exp() * values).sum(0) * torch.sigmoid(total + 12.429216196844383)


def published(x):
    y = blurred(x)
    weight = y.exp()
    return F.avg_pool2d(y * weight, 2) / (F.avg_pool2d(weight, 2) + 1e-6)


def floor_bytes(shape, itemsize, mode):
    n, c, height, width = shape
    x, y = n * c * height * width, n * c * (height // 2) * (width // 2)
    return itemsize * (x + y + (2 * x + y if mode == "forward+backward" else 0))


BENCHMARKS = (
    Benchmark(
        op="blur_soft_pool2d",
        function=ops.blur_soft_pool2d,
        eager=eager,
        inputs=lambda shape, dtype: (tensor(*shape, dtype=dtype, seed=1),),
        shapes=SHAPES,
        gate_shapes=SHAPES[:1],
        tiny_shape=(1, 3, 6, 10),
        floor_bytes=floor_bytes,
        competitors=(Competitor("published", lambda: published),),
        layouts=("contiguous",),
    ),
)
