"""time_basis against plain PyTorch: one expert of K-MOTE, with the gate open for half of the timestamps.

Floor: forward reads timestamps and gates and writes the embedding; the gradient reads all three and writes gradients of
the first two. What limits is the functions: some 20 operations each, twice as many with the derivative. A shape is N,
D, J, kind.
"""

import torch

from benchmarks.registry import Benchmark
from evkernels import ops
from evkernels.testing import tensor


def eager(t, gate, rate, shift, weight, kind):
    z = torch.addcmul(shift, rate, t[:, None, None])
    if kind == "cosine":
        basis = z.cos()
    else:
        square = z * z
        basis = torch.exp(-0.5 * square)
        if kind == "mexican_hat":
            basis = basis * (1 - square)
    # A product with a matrix that is zero between features is faster than a sum over so short an axis.
    mixing = weight.T.diag_embed().transpose(0, 1).flatten(0, 1)
    # No gradient to closed gates.
    return basis.flatten(1) @ mixing * (gate * (gate != 0))[:, None]


def inputs(shape, dtype):
    n, features, functions, _ = shape
    generator = torch.Generator().manual_seed(1)
    t, gate = torch.rand(2, n, generator=generator).to(dtype)
    parameters = [tensor(features, functions, dtype=dtype, seed=seed) for seed in (2, 3, 4)]
    return t, gate * (gate > 0.5), *parameters, shape[3]


def floor_bytes(shape, itemsize, mode):
    n, features, _, _ = shape
    return itemsize * n * ((6 + 2 * features) if mode == "forward+backward" else 2 + features)


def floor_flops(shape, mode):
    n, features, functions, _ = shape
    return 20 * n // 2 * features * functions * (3 if mode == "forward+backward" else 1)


SHAPES = ((19200, 8, 16, "cosine"), (19200, 8, 5, "gaussian"), (19200, 8, 8, "mexican_hat"))
BENCHMARKS = (
    Benchmark(
        op="time_basis",
        function=ops.time_basis,
        eager=eager,
        inputs=inputs,
        shapes=SHAPES,
        gate_shapes=SHAPES,
        tiny_shape=(65, 7, 9, "cosine"),
        floor_bytes=floor_bytes,
        floor_flops=floor_flops,
        items=lambda shape: shape[0],
        item="timestamp",
        label=lambda shape: f"{shape[0]}x{shape[1]}x{shape[2]} {shape[3]}",
        dtypes=(torch.float32,),
        layouts=("contiguous",),
    ),
)
