"""gru_gates, gru_reset and gru_update against plain PyTorch at the shapes of recurrent detectors and reconstruction.

Floors, in values per element of the state: what each op reads and writes once, its gradient included where timed.
`lerp` is the shortest blend in plain PyTorch; it writes h + z*(n - h), which is NaN where both are infinite.
"""

import torch

from benchmarks.registry import Benchmark, Competitor
from evkernels import ops
from evkernels.testing import tensor

SHAPES = ((2, 64, 17, 22), (2, 256, 23, 40), (2, 128, 45, 80), (2, 64, 90, 160))
GATE_SHAPES = ((2, 64, 17, 22), (2, 256, 23, 40))
TINY_SHAPE = (2, 5, 3, 7)


def eager_gates(x_gates, h_gates, h):
    z, r, n = (x_gates + h_gates).chunk(3, dim=1)
    z = z.sigmoid()
    return (1 - z) * h + z * (n + r.sigmoid() * h).tanh()


def lerp_gates(x_gates, h_gates, h):
    z, r, n = (x_gates + h_gates).chunk(3, dim=1)
    return torch.lerp(h, torch.addcmul(n, r.sigmoid(), h).tanh(), z.sigmoid())


def eager_reset(zr, h):
    z, r = zr.sigmoid().chunk(2, dim=1)
    return z, r * h


def eager_update(z, n, h):
    return (1 - z) * h + z * n.tanh()


def lerp_update(z, n, h):
    return torch.lerp(h, n.tanh(), z)


def blocks(count, shape, dtype, seed):
    n, c, *spatial = shape
    return 3 * tensor(n, count * c, *spatial, dtype=dtype, seed=seed)


def floor(forward, backward):
    def floor_bytes(shape, itemsize, mode):
        values = forward + backward if mode == "forward+backward" else forward
        return values * itemsize * torch.Size(shape).numel()

    return floor_bytes


BENCHMARKS = (
    Benchmark(
        op="gru_gates",
        function=ops.gru_gates,
        eager=eager_gates,
        inputs=lambda shape, dtype: (*(blocks(3, shape, dtype, seed) for seed in (1, 2)), tensor(*shape, dtype=dtype)),
        shapes=SHAPES,
        gate_shapes=GATE_SHAPES,
        tiny_shape=TINY_SHAPE,
        floor_bytes=floor(8, 12),
        competitors=(Competitor("eager lerp", lambda: lerp_gates),),
    ),
    Benchmark(
        op="gru_reset",
        function=ops.gru_reset,
        eager=eager_reset,
        inputs=lambda shape, dtype: (blocks(2, shape, dtype, 1), tensor(*shape, dtype=dtype)),
        shapes=SHAPES,
        # Two sigmoids and a product in which eager writes no second copy of z: small shapes are lost to call overhead.
        gate_shapes=((2, 256, 23, 40),),
        tiny_shape=TINY_SHAPE,
        floor_bytes=floor(5, 8),
    ),
    Benchmark(
        op="gru_update",
        function=ops.gru_update,
        eager=eager_update,
        inputs=lambda shape, dtype: (
            blocks(1, shape, dtype, 1).sigmoid(),
            blocks(1, shape, dtype, 2),
            tensor(*shape, dtype=dtype),
        ),
        shapes=SHAPES,
        gate_shapes=GATE_SHAPES,
        tiny_shape=TINY_SHAPE,
        floor_bytes=floor(4, 7),
        competitors=(Competitor("eager lerp", lambda: lerp_update),),
    ),
)
