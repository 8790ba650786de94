"""retrieval_recall against plain PyTorch, which stores all similarities and sorts or ranks them.

Floor: features are read; operations are those of the product of all with all. Competitors: sorting the ten largest, as
evaluations are mostly written, and counting larger ones, which breaks ties another way. A shape is N, D.
"""

import torch
import torch.nn.functional as F

from benchmarks.registry import Benchmark, Competitor
from evkernels import ops
from evkernels.testing import tensor

KS = [1, 5, 10]


def _similarities(queries, targets):
    return F.normalize(queries, dim=1) @ F.normalize(targets, dim=1).T


def eager(queries, targets):
    best = _similarities(queries, targets).topk(KS[-1], dim=1).indices
    found = best == torch.arange(len(best), device=best.device)[:, None]
    return torch.stack([found[:, :k].any(1).double().mean() for k in KS])


def by_counts(queries, targets):
    similarities = _similarities(queries, targets)
    ranks = (similarities > similarities.diagonal()[:, None]).sum(1)
    return torch.stack([(ranks < k).double().mean() for k in KS])


def inputs(shape, dtype):
    targets, noise = (tensor(*shape, dtype=dtype, seed=seed) for seed in range(2))
    return targets + 2 * noise, targets


BENCHMARKS = (
    Benchmark(
        op="retrieval_recall",
        function=lambda queries, targets: ops.retrieval_recall(queries, targets, KS),
        eager=eager,
        inputs=inputs,
        shapes=((4096, 256), (1000, 512)),
        gate_shapes=((4096, 256),),
        tiny_shape=(33, 24),
        floor_bytes=lambda shape, itemsize, mode: itemsize * shape[0] * shape[1] * 2,
        floor_flops=lambda shape, mode: 2 * shape[0] ** 2 * shape[1],
        items=lambda shape: shape[0],
        item="query",
        dtypes=(torch.float32,),
        modes=("inference",),
        layouts=("contiguous",),
        competitors=(Competitor("by counts", lambda: by_counts),),
    ),
)
