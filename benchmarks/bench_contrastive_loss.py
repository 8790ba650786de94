"""contrastive_loss against plain PyTorch and the loss of open_clip's kind, at the batches of contrastive pretraining.

Floor: features are read and, backward, gradients written; operations are those of the products, one forward and three
backward, where the logits are computed again (plain PyTorch keeps them and needs two). Competitors: the loss written
with sums of exponentials instead of cross entropies, which plain PyTorch and torch.compile both run faster. A shape is
B, D.
"""

import torch
import torch.nn.functional as F

from benchmarks.registry import Benchmark, Competitor
from evkernels import ops
from evkernels.testing import tensor


def eager(a, b, scale):
    p, q = F.normalize(a, dim=1), F.normalize(b, dim=1)
    logits, own = scale * (p @ q.T), torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def by_sums(a, b, scale):
    p, q = F.normalize(a, dim=1), F.normalize(b, dim=1)
    logits = scale * p @ q.T
    return (logits.logsumexp(1) + logits.logsumexp(0) - 2 * logits.diagonal()).mean() / 2


def inputs(shape, dtype):
    a, noise = (tensor(*shape, dtype=dtype, seed=seed) for seed in range(2))
    return a, a * 0.2 + noise, torch.tensor(1 / 0.07, dtype=dtype)


BENCHMARKS = (
    Benchmark(
        op="contrastive_loss",
        function=ops.contrastive_loss,
        eager=eager,
        inputs=inputs,
        shapes=((4096, 256), (1024, 256), (256, 512)),
        gate_shapes=((1024, 256),),
        tiny_shape=(33, 24),
        floor_bytes=lambda shape, itemsize, mode: (
            itemsize * shape[0] * shape[1] * (6 if mode == "forward+backward" else 2)
        ),
        floor_flops=lambda shape, mode: 2 * shape[0] ** 2 * shape[1] * (4 if mode == "forward+backward" else 1),
        items=lambda shape: shape[0],
        item="pair",
        dtypes=(torch.float32,),
        layouts=("contiguous",),
        competitors=(
            Competitor("by sums", lambda: by_sums),
            Competitor("by sums compile", lambda: torch.compile(by_sums, dynamic=False)),
        ),
    ),
)
