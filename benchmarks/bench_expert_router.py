"""expert_router against plain PyTorch: K-MOTE's router, from timestamps to the gates of four experts.

Floor: forward reads the timestamps and writes weights and gates; the gradient reads all three and writes that of the
timestamps. What limits is the products: once forward, and for the gradient forward again, to the inputs, to the
weights.
"""

import itertools

import torch
import torch.nn.functional as F

from benchmarks.registry import Benchmark
from evkernels import ops
from evkernels.testing import tensor


def eager(x, weight1, bias1, weight2, bias2, weight3, bias3, top):
    hidden = F.linear(F.linear(x, weight1, bias1).relu(), weight2, bias2).relu()
    weights = F.linear(hidden, weight3, bias3).softmax(dim=1)
    largest, chosen = weights.topk(top, dim=1)
    return weights.T, torch.zeros_like(weights).scatter(1, chosen, largest).T


def inputs(shape, dtype):
    n, *sizes, top = shape
    parameters = []
    for layer, (size, outputs) in enumerate(itertools.pairwise(sizes)):
        parameters.append(tensor(outputs, size, dtype=dtype, seed=2 * layer) * size**-0.5)
        parameters.append(tensor(outputs, dtype=dtype, seed=2 * layer + 1) * size**-0.5)
    return torch.rand(n, sizes[0], generator=torch.Generator().manual_seed(1)).to(dtype), *parameters, top


def floor_bytes(shape, itemsize, mode):
    n, size, *_, experts, _ = shape
    return itemsize * n * (2 * (size + experts) + 2 * experts if mode == "forward+backward" else size + 2 * experts)


def floor_flops(shape, mode):
    n, *sizes, _ = shape
    products = sum(size * outputs for size, outputs in itertools.pairwise(sizes))
    return 2 * n * products * (4 if mode == "forward+backward" else 1)


SHAPES = ((19200, 1, 64, 32, 4, 2), (19200, 17, 64, 32, 4, 2))
BENCHMARKS = (
    Benchmark(
        op="expert_router",
        function=ops.expert_router,
        eager=eager,
        inputs=inputs,
        shapes=SHAPES,
        gate_shapes=SHAPES,
        tiny_shape=(65, 2, 7, 9, 4, 2),
        floor_bytes=floor_bytes,
        floor_flops=floor_flops,
        items=lambda shape: shape[0],
        item="timestamp",
        dtypes=(torch.float32,),
        layouts=("contiguous",),
    ),
)
