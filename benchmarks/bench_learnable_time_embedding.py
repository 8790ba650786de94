"""learnable_time_embedding against plain PyTorch at the sizes of LSTM classifiers of event sequences.

Floor: forward reads the timestamps and writes the embedding; the gradient reads both again and writes the gradient of
the timestamps. Multiplications and additions of the two mixing products, forward, at both gradients, and once more
where the gradient recomputes them. Competitors: the published form (products before sums), and the reference, which
contracts instead. A shape is N, F, S.
"""

import torch
import torch.nn.functional as F

from benchmarks.registry import Benchmark, Competitor
from evkernels import ops, reference
from evkernels.testing import tensor

HARMONICS, BASES = 5, 8


def bases_by_recursion(v):
    knots = torch.arange(-3, BASES + 1, dtype=v.dtype, device=v.device) * (2 / (BASES - 3)) - 1
    v = v[..., None]
    bases = ((v >= knots[:-1]) & (v < knots[1:])).to(v.dtype)
    for k in range(1, 4):
        rising = (v - knots[: -(k + 1)]) / (knots[k:-1] - knots[: -(k + 1)]) * bases[..., :-1]
        falling = (knots[k + 1 :] - v) / (knots[k + 1 :] - knots[1:-k]) * bases[..., 1:]
        bases = rising + falling
    return bases


def eager(
    t, frequency, phase, fourier_weight, fourier_bias, rate, shift, base_weight, spline_weight, norm_weight, norm_bias,
    scale,
):  # fmt: skip
    u = F.linear(t[:, None], frequency[:, None], phase)
    angles = (u[..., None] * torch.arange(1, HARMONICS + 1, dtype=t.dtype, device=t.device))[:, None]
    fourier = (angles.cos() * fourier_weight[0]).sum((-1, -2)) + (angles.sin() * fourier_weight[1]).sum((-1, -2))
    v = F.linear(t[:, None], rate[:, None], shift)
    spline = F.linear(v.tanh(), base_weight) + F.linear(bases_by_recursion(v).flatten(1), spline_weight.flatten(1))
    embedding = torch.cat([fourier + fourier_bias, spline], dim=1)
    return F.layer_norm(embedding, embedding.shape[1:], norm_weight, norm_bias) * scale


def inputs(shape, dtype):
    n, f, s = shape
    t = torch.rand(n, generator=torch.Generator().manual_seed(1)).to(dtype)
    rates = [10 ** -torch.linspace(0, 9, size, dtype=torch.float64).to(dtype) for size in (f, s)]
    return (
        t,
        rates[0],
        torch.zeros(f, dtype=dtype),
        tensor(2, f, f, HARMONICS, dtype=dtype, seed=2) * (f * HARMONICS) ** -0.5,
        torch.zeros(f, dtype=dtype),
        rates[1],
        torch.zeros(s, dtype=dtype),
        tensor(s, s, dtype=dtype, seed=3) * s**-0.5,
        tensor(s, s, BASES, dtype=dtype, seed=4) * s**-0.5,
        torch.ones(f + s, dtype=dtype),
        torch.zeros(f + s, dtype=dtype),
        torch.ones(f + s, dtype=dtype),
    )


def floor_bytes(shape, itemsize, mode):
    n, f, s = shape
    return itemsize * n * ((3 + 2 * (f + s)) if mode == "forward+backward" else 1 + f + s)


def floor_flops(shape, mode):
    n, f, s = shape
    # Four of the bases are not zero.
    return 2 * n * (2 * HARMONICS * f * f + 5 * s * s) * (4 if mode == "forward+backward" else 1)


BENCHMARKS = (
    Benchmark(
        op="learnable_time_embedding",
        function=ops.learnable_time_embedding,
        eager=eager,
        inputs=inputs,
        shapes=((19200, 16, 16), (2560, 16, 16), (19200, 32, 32)),
        gate_shapes=((19200, 16, 16),),
        tiny_shape=(65, 12, 12),
        floor_bytes=floor_bytes,
        floor_flops=floor_flops,
        items=lambda shape: shape[0],
        item="timestamp",
        dtypes=(torch.float32,),
        layouts=("contiguous",),
        competitors=(
            Competitor("contracted", lambda: reference.learnable_time_embedding),
            Competitor("contracted compile", lambda: torch.compile(reference.learnable_time_embedding, dynamic=False)),
        ),
    ),
)
