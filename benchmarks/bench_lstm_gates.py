"""lstm_gates against plain PyTorch at the shapes of recurrent detectors and reconstruction networks.

Floor: forward reads four gates and c and writes h and c_next; the gradient reads gates, c and two gradients and
writes two. The chunk style is the fastest plain PyTorch with gradients, reusing its temporaries without.
"""

import torch

from benchmarks.registry import Benchmark, Competitor
from evkernels import ops
from evkernels.testing import tensor


def eager(gates, c):
    i, f, g, o = gates.chunk(4, dim=1)
    c_next = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c_next.tanh(), c_next


def eager_in_place(gates, c):
    i, f, g, o = gates.chunk(4, dim=1)
    c_next = f.sigmoid().mul_(c).addcmul_(i.sigmoid(), g.tanh())
    return o.sigmoid().mul_(c_next.tanh()), c_next


def inputs(shape, dtype):
    n, c, *spatial = shape
    return 3 * tensor(n, 4 * c, *spatial, dtype=dtype, seed=1), tensor(*shape, dtype=dtype, seed=2)


def floor_bytes(shape, itemsize, mode):
    values = 7 + 12 if mode == "forward+backward" else 7
    return values * itemsize * torch.Size(shape).numel()


BENCHMARKS = (
    Benchmark(
        op="lstm_gates",
        function=ops.lstm_gates,
        eager=eager,
        inputs=inputs,
        shapes=(
            (2, 64, 17, 22),
            (2, 512, 12, 20),
            (2, 256, 23, 40),
            (2, 128, 45, 80),
            (2, 64, 90, 160),
            (8, 64, 90, 160),
        ),
        gate_shapes=((2, 64, 17, 22), (2, 256, 23, 40)),
        tiny_shape=(2, 5, 3, 7),
        floor_bytes=floor_bytes,
        competitors=(Competitor("eager in-place", lambda: eager_in_place, modes=("inference",)),),
    ),
)
