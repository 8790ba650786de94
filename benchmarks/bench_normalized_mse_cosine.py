"""normalized_mse_cosine against plain PyTorch at the features of alignment: CLIP's and those of whole images.

Floor: features are read and, backward, read again and their gradients written. A shape is N, D.
"""

import torch
import torch.nn.functional as F

from benchmarks.registry import Benchmark, Competitor
from evkernels import ops
from evkernels.testing import tensor


def eager(a, b):
    p, q = F.normalize(a, dim=1), F.normalize(b, dim=1)
    return F.mse_loss(p, q), (p * q).sum(1).mean()


def with_cosine_similarity(a, b):
    return F.mse_loss(F.normalize(a, dim=1), F.normalize(b, dim=1)), F.cosine_similarity(a, b).mean()


def inputs(shape, dtype):
    a, noise = (tensor(*shape, dtype=dtype, seed=seed) for seed in range(2))
    return a, a + noise / 2


BENCHMARKS = (
    Benchmark(
        op="normalized_mse_cosine",
        function=ops.normalized_mse_cosine,
        eager=eager,
        inputs=inputs,
        shapes=((4096, 1024), (64, 150528)),
        gate_shapes=((4096, 1024),),
        tiny_shape=(33, 24),
        floor_bytes=lambda shape, itemsize, mode: (
            itemsize * shape[0] * shape[1] * (6 if mode == "forward+backward" else 2)
        ),
        dtypes=(torch.float32,),
        layouts=("contiguous",),
        competitors=(Competitor("cosine_similarity", lambda: with_cosine_similarity),),
    ),
)
