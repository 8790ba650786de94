"""Learnable time embedding (LeTE) in Triton: one program embeds a block of timestamps; its neighbour has the gradient.

Features of FEATURES inputs are computed once into a tile [timestamps, features] and multiplied, in float32 and without
the matrix units, into sums [timestamps, outputs] in registers, so that nothing but timestamps and embeddings moves: 4 +
4 (F + S) bytes per timestamp. These products set the time, not memory: of F = S = 16, 5 harmonics and 8 bases they are
4,864 multiply-adds per timestamp, 9.6 us for 19,200 timestamps at an A100's 19.5 TFLOP/s and 2.8 at an H100's 67,
where the bytes take 1.6 and 0.8. The compiled kernel executes 7,200 float instructions per timestamp, a third of
them for sines, tanh and bases. On sm_90 Triton lays the factors out with bank conflicts, 3.3 passes through shared
memory for 1, so that these are modelled as ten times the products' time (1.9 times on sm_80): docs/gpu.md.

What lost, as modelled: columns of the weights multiplied by one feature at a time, where each of the four threads that
share a timestamp computes all sines of it, with the library's sine and its local memory (6 times the time of float
instructions). Loops over harmonics and bases unrolled: 255 registers instead of 168 for 1 % fewer of them.
"""

import triton
import triton.language as tl
from evkernels.triton_kernels.launch import arithmetic_dtype, launch
from evkernels.triton_kernels.math import cosine_sine, tanh
from torch import Tensor

# Features multiplied at a time, the fewest that a product takes; elements of a tile of outputs, 16 per thread; its rows
# at most. With 8 per thread shared memory, through which the factors come, is passed 1.4 times as often at F = 64.
FEATURES, TILE, MOST_ROWS = 16, 2048, 64


@triton.jit
def cubic_basis(v, b, B: tl.constexpr):
    """The b-th of B cubic B-spline bases on [-1, 1] and its derivative, from the distance to its middle."""
    half: tl.constexpr = 0.5 * (B - 3)
    x = v * half + (half + 1.0 - b)
    d = tl.abs(x)
    rest = tl.where(d < 2.0, 2.0 - d, 0.0)
    value = tl.where(d < 1.0, (0.5 * d - 1.0) * d * d + 2.0 / 3.0, rest * rest * rest / 6.0)
    slope = tl.where(d < 1.0, (1.5 * d - 2.0) * x, rest * rest * tl.where(x < 0.0, 0.5, -0.5))
    return value, slope * half


@triton.jit
def arguments(t, rate_ptr, shift_ptr, i, count, DTYPE: tl.constexpr):
    """The arguments of the features i at all times, [times, features], and their rates; 0 where there are no more."""
    rate = tl.load(rate_ptr + i, i < count, 0.0).to(DTYPE)[None, :]
    argument = t[:, None] * rate + tl.load(shift_ptr + i, i < count, 0.0).to(DTYPE)[None, :]
    # An infinite time has no product with 0.
    return tl.where(i[None, :] < count, argument, 0.0), rate


@triton.jit
def product(a, b, DTYPE: tl.constexpr):
    return tl.dot(a, b, input_precision="ieee", out_dtype=DTYPE)


@triton.jit
def _mixed(sums, feature, weight_ptr, at, is_weight, DTYPE: tl.constexpr):
    # Added block by block: one sum over all features rounds several times as much.
    return sums + product(feature, tl.load(weight_ptr + at, is_weight, 0.0).to(DTYPE), DTYPE)


@triton.jit
def parts(
    t, fourier_rate_ptr, fourier_shift_ptr, fourier_weight_ptr, fourier_bias_ptr, spline_rate_ptr, spline_shift_ptr,
    base_weight_ptr, spline_weight_ptr, F, S, G: tl.constexpr, B: tl.constexpr, FOURIER: tl.constexpr,
    SPLINE: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Both parts before the norm, [ROWS, FOURIER] and [ROWS, SPLINE]; zeros in columns that are no outputs."""
    o = tl.arange(0, FOURIER).to(tl.int64)[None, :]
    fourier = tl.zeros((ROWS, FOURIER), DTYPE)
    for first in range(0, F, FEATURES):
        i = first + tl.arange(0, FEATURES)
        u, _ = arguments(t, fourier_rate_ptr, fourier_shift_ptr, i, F, DTYPE)
        c1, s1 = cosine_sine(u)
        c, s = c1, s1
        at, is_weight = (o * F + i[:, None]) * G, (i[:, None] < F) & (o < F)
        for k in range(G):
            fourier = _mixed(fourier, c, fourier_weight_ptr, at + k, is_weight, DTYPE)
            fourier = _mixed(fourier, s, fourier_weight_ptr, (o * 0 + F) * F * G + at + k, is_weight, DTYPE)
            c, s = c * c1 - s * s1, s * c1 + c * s1
    # Last, because a sum that starts from a large bias rounds every small product to the bias's own unit.
    fourier += tl.load(fourier_bias_ptr + o, o < F, 0.0).to(DTYPE)
    o = tl.arange(0, SPLINE).to(tl.int64)[None, :]
    spline = tl.zeros((ROWS, SPLINE), DTYPE)
    for first in range(0, S, FEATURES):
        i = first + tl.arange(0, FEATURES)
        v, _ = arguments(t, spline_rate_ptr, spline_shift_ptr, i, S, DTYPE)
        at, is_weight = o * S + i[:, None], (i[:, None] < S) & (o < S)
        spline = _mixed(spline, tanh(v), base_weight_ptr, at, is_weight, DTYPE)
        for b in range(B):
            spline = _mixed(spline, cubic_basis(v, b, B)[0], spline_weight_ptr, at * B + b, is_weight, DTYPE)
    return fourier, spline


@triton.jit
def normed(fourier, spline, F, S, eps, FOURIER: tl.constexpr, SPLINE: tl.constexpr):
    """Both parts less their common mean and over their common deviation, and 1 / deviation."""
    dim = F + S
    mean = ((tl.sum(fourier, 1) + tl.sum(spline, 1)) / dim)[:, None]
    fourier = tl.where(tl.arange(0, FOURIER)[None, :] < F, fourier - mean, 0.0)
    spline = tl.where(tl.arange(0, SPLINE)[None, :] < S, spline - mean, 0.0)
    inverse = (1.0 / tl.sqrt((tl.sum(fourier * fourier, 1) + tl.sum(spline * spline, 1)) / dim + eps))[:, None]
    return fourier * inverse, spline * inverse, inverse


@triton.jit
def scaled(y, norm_weight_ptr, norm_bias_ptr, scale_ptr, o, is_output, DTYPE: tl.constexpr):
    if norm_weight_ptr is not None:
        y = y * tl.load(norm_weight_ptr + o, is_output, 0.0).to(DTYPE)[None, :]
        y += tl.load(norm_bias_ptr + o, is_output, 0.0).to(DTYPE)[None, :]
    if scale_ptr is not None:
        y = y * tl.load(scale_ptr + o, is_output, 0.0).to(DTYPE)[None, :]
    return y


@triton.jit
def learnable_time_embedding_forward_kernel(
    t_ptr, fourier_rate_ptr, fourier_shift_ptr, fourier_weight_ptr, fourier_bias_ptr, spline_rate_ptr,
    spline_shift_ptr, base_weight_ptr, spline_weight_ptr, norm_weight_ptr, norm_bias_ptr, scale_ptr, embedding_ptr,
    eps, N, F, S, G: tl.constexpr, B: tl.constexpr, FOURIER: tl.constexpr, SPLINE: tl.constexpr, ROWS: tl.constexpr,
    FEATURES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t = tl.load(t_ptr + row, row < N, 0.0).to(DTYPE)
    fourier, spline = parts(
        t, fourier_rate_ptr, fourier_shift_ptr, fourier_weight_ptr, fourier_bias_ptr, spline_rate_ptr,
        spline_shift_ptr, base_weight_ptr, spline_weight_ptr, F, S, G, B, FOURIER, SPLINE, ROWS, FEATURES, DTYPE,
    )  # fmt: skip
    if norm_weight_ptr is not None:
        fourier, spline, _ = normed(fourier, spline, F, S, eps, FOURIER, SPLINE)
    to = embedding_ptr + row[:, None] * (F + S)
    o = tl.arange(0, FOURIER)
    fourier = scaled(fourier, norm_weight_ptr, norm_bias_ptr, scale_ptr, o, o < F, DTYPE)
    tl.store(to + o[None, :], fourier, (row[:, None] < N) & (o[None, :] < F))
    o = tl.arange(0, SPLINE)
    spline = scaled(spline, norm_weight_ptr, norm_bias_ptr, scale_ptr, F + o, o < S, DTYPE)
    tl.store(to + F + o[None, :], spline, (row[:, None] < N) & (o[None, :] < S))


def learnable_time_embedding(t: Tensor, *arguments) -> Tensor:
    t, tensors, eps = t.contiguous(), [contiguous(value) for value in arguments[:-1]], arguments[-1]
    sizes = sizes_of(t, *tensors)
    embedding = t.new_empty(len(t), sizes["F"] + sizes["S"])
    if len(t):
        programs = triton.cdiv(len(t), sizes["ROWS"])
        launch(learnable_time_embedding_forward_kernel, programs)(t, *tensors, embedding, eps, **sizes)
    return embedding


def contiguous(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


def sizes_of(t, fourier_frequency, fourier_phase, fourier_weight, fourier_bias, spline_rate, *rest) -> dict:
    """Sizes of the call, of a program's tile and its warps, by the kernels' names for them."""
    f, s, bases = len(fourier_frequency), len(spline_rate), rest[2].shape[-1]
    widths = [max(triton.next_power_of_2(max(count, 1)), FEATURES) for count in (f, s)]
    rows = min(MOST_ROWS, max(TILE // max(widths), FEATURES))
    return {
        "N": len(t),
        "F": f,
        "S": s,
        "G": fourier_weight.shape[-1],
        "B": bases,
        "FOURIER": widths[0],
        "SPLINE": widths[1],
        "ROWS": rows,
        "FEATURES": FEATURES,
        "DTYPE": arithmetic_dtype(t),
        "num_warps": max(rows * max(widths) // 512, 2),
        "num_stages": 1,
    }
