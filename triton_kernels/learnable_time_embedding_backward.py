"""Gradient of the learnable time embedding in Triton: two steps, and sums over programs by PyTorch, without atomics.

The first step embeds again and takes the gradient through scale and norm to both parts [timestamps, F + S], float32.
In the second a program holds 32 functions (harmonics, tanh, or bases of some features) and up to 32 outputs, goes
through the timestamps in steps of ROWS, and keeps the sums for its weights in registers: d_weight of outputs x
functions, and of each function's rate and shift. It computes its functions for these timestamps alone, each harmonic by
its own cosine and sine. The products are 3 times the forward's, which set the time: 29 us for 19,200 timestamps, F = S
= 16, at an A100's 19.5 TFLOP/s; 2.4 times as much is modelled (7 times on an H100), for the factors' passes through
shared memory. 32 outputs take all 255 registers of a thread, of which an eighth of the warps fit.

What lost: one program for all functions of 16 features, which shares their sines. Its 10 sums of 16 x 16 leave each
thread 2 elements of a product, whose factors take 3 times as many passes through shared memory (35 us modelled for
4,800 timestamps instead of 13); with fewer warps it spills 750 to 7,000 bytes.
"""

import torch
import triton
import triton.language as tl
from evkernels.triton_kernels.launch import arithmetic_dtype, launch
from evkernels.triton_kernels.learnable_time_embedding import (
    arguments,
    contiguous,
    cubic_basis,
    normed,
    parts,
    product,
    scaled,
    sizes_of,
)
from evkernels.triton_kernels.math import cosine_sine, tanh
from torch import Tensor

# Timestamps at a time; functions and outputs of a program; programs at most, because each writes its sums.
ROWS, COLUMNS, OUTPUTS, MOST_PROGRAMS = 16, 32, 32, 512


@triton.jit
def _before_scale(
    d, y, norm_weight_ptr, norm_bias_ptr, scale_ptr, sums_ptr, dim, o, is_output, DTYPE: tl.constexpr,
):  # fmt: skip
    """The gradient before scale, weight and bias of the norm; writes theirs."""
    if scale_ptr is not None:
        before = scaled(y, norm_weight_ptr, norm_bias_ptr, None, o, is_output, DTYPE)
        tl.store(sums_ptr + 2 * dim + o, tl.sum(d * before, 0), is_output)
        d = d * tl.load(scale_ptr + o, is_output, 0.0).to(DTYPE)[None, :]
    if norm_weight_ptr is not None:
        tl.store(sums_ptr + o, tl.sum(d * y, 0), is_output)
        tl.store(sums_ptr + dim + o, tl.sum(d, 0), is_output)
        d = d * tl.load(norm_weight_ptr + o, is_output, 0.0).to(DTYPE)[None, :]
    return d


@triton.jit
def learnable_time_embedding_backward_parts_kernel(
    grad_ptr, t_ptr, fourier_rate_ptr, fourier_shift_ptr, fourier_weight_ptr, fourier_bias_ptr, spline_rate_ptr,
    spline_shift_ptr, base_weight_ptr, spline_weight_ptr, norm_weight_ptr, norm_bias_ptr, scale_ptr, d_parts_ptr,
    sums_ptr, eps, N, F, S, G: tl.constexpr, B: tl.constexpr, FOURIER: tl.constexpr, SPLINE: tl.constexpr,
    ROWS: tl.constexpr, FEATURES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradients at both parts, and a program's sums for weight and bias of the norm, scale and Fourier bias."""
    program = tl.program_id(0).to(tl.int64)
    row = program * ROWS + tl.arange(0, ROWS)
    dim = program * 0 + F + S
    o_fourier, o_spline = tl.arange(0, FOURIER), tl.arange(0, SPLINE)
    in_fourier = (row[:, None] < N) & (o_fourier[None, :] < F)
    in_spline = (row[:, None] < N) & (o_spline[None, :] < S)
    sums_ptr += program * 4 * dim
    fourier, spline = tl.zeros((ROWS, FOURIER), DTYPE), tl.zeros((ROWS, SPLINE), DTYPE)
    inverse = tl.zeros((ROWS, 1), DTYPE)
    if norm_weight_ptr is not None or scale_ptr is not None:
        t = tl.load(t_ptr + row, row < N, 0.0).to(DTYPE)
        fourier, spline = parts(
            t, fourier_rate_ptr, fourier_shift_ptr, fourier_weight_ptr, fourier_bias_ptr, spline_rate_ptr,
            spline_shift_ptr, base_weight_ptr, spline_weight_ptr, F, S, G, B, FOURIER, SPLINE, ROWS, FEATURES, DTYPE,
        )  # fmt: skip
    if norm_weight_ptr is not None:
        fourier, spline, inverse = normed(fourier, spline, F, S, eps, FOURIER, SPLINE)
    at = row[:, None] * dim
    d_fourier = tl.load(grad_ptr + at + o_fourier[None, :], in_fourier, 0.0).to(DTYPE)
    d_spline = tl.load(grad_ptr + at + F + o_spline[None, :], in_spline, 0.0).to(DTYPE)
    d_fourier = _before_scale(
        d_fourier, fourier, norm_weight_ptr, norm_bias_ptr, scale_ptr, sums_ptr, dim, o_fourier, o_fourier < F, DTYPE
    )
    d_spline = _before_scale(
        d_spline, spline, norm_weight_ptr, norm_bias_ptr, scale_ptr, sums_ptr, dim, F + o_spline, o_spline < S, DTYPE
    )
    if norm_weight_ptr is not None:
        mean = ((tl.sum(d_fourier, 1) + tl.sum(d_spline, 1)) / dim)[:, None]
        along = ((tl.sum(d_fourier * fourier, 1) + tl.sum(d_spline * spline, 1)) / dim)[:, None]
        d_fourier = tl.where(in_fourier, (d_fourier - mean - fourier * along) * inverse, 0.0)
        d_spline = tl.where(in_spline, (d_spline - mean - spline * along) * inverse, 0.0)
    tl.store(sums_ptr + 3 * dim + o_fourier, tl.sum(d_fourier, 0), o_fourier < F)
    tl.store(d_parts_ptr + at + o_fourier[None, :], d_fourier, in_fourier)
    tl.store(d_parts_ptr + at + F + o_spline[None, :], d_spline, in_spline)


@triton.jit
def _waves(u, harmonic):
    """Cosine and sine of a harmonic, and their derivatives."""
    c, s = cosine_sine(u * harmonic)
    return c, s, -harmonic * s, harmonic * c


@triton.jit
def learnable_time_embedding_backward_features_kernel(
    d_parts_ptr, t_ptr, rate_ptr, shift_ptr, weight_ptr, d_t_ptr, d_arguments_ptr, d_weight_ptr, N, count, first_part,
    dim, blocks, KIND: tl.constexpr, FUNCTIONS: tl.constexpr, COLUMNS: tl.constexpr, OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Gradients behind the functions COLUMNS of a part, FUNCTIONS of each of its `count` features, from OUTPUTS."""
    program = tl.program_id(0).to(tl.int64)
    size = program * 0 + count
    columns, outputs = size * FUNCTIONS, tl.cdiv(count, OUTPUTS)
    block, tile = program % blocks, program // blocks
    o = (tile % outputs) * OUTPUTS + tl.arange(0, OUTPUTS)
    j = (tile // outputs) * COLUMNS + tl.arange(0, COLUMNS)
    i, function = j // FUNCTIONS, (j % FUNCTIONS).to(tl.int32)
    at, is_weight = o[:, None] * columns + j[None, :], (o[:, None] < count) & (j[None, :] < columns)
    d_weight = tl.zeros((OUTPUTS, COLUMNS), DTYPE)
    if KIND == "waves":
        d_sine_weight = tl.zeros((OUTPUTS, COLUMNS), DTYPE)
    d_rate, d_shift = tl.zeros((COLUMNS,), DTYPE), tl.zeros((COLUMNS,), DTYPE)
    for first in range(block * ROWS, N, blocks * ROWS):
        row = first + tl.arange(0, ROWS)
        t = tl.load(t_ptr + row, row < N, 0.0).to(DTYPE)
        inside = (row[:, None] < N) & (o[None, :] < count)
        d = tl.load(d_parts_ptr + row[:, None] * dim + first_part + o[None, :], inside, 0.0)
        argument, rate = arguments(t, rate_ptr, shift_ptr, i, count, DTYPE)
        d_argument = product(d, tl.load(weight_ptr + at, is_weight, 0.0).to(DTYPE), DTYPE)
        if KIND == "waves":
            value, sine, slope, sine_slope = _waves(argument, (function + 1).to(DTYPE)[None, :])
            sine_weight = tl.load(weight_ptr + size * columns + at, is_weight, 0.0).to(DTYPE)
            d_argument = d_argument * slope + product(d, sine_weight, DTYPE) * sine_slope
            d_sine_weight += product(tl.trans(d), sine, DTYPE)
        elif KIND == "bases":
            value, slope = cubic_basis(argument, function.to(DTYPE)[None, :], FUNCTIONS)
            d_argument *= slope
        else:
            value = tanh(argument)
            d_argument *= (1.0 - value) * (1.0 + value)
        d_weight += product(tl.trans(d), value, DTYPE)
        d_rate += tl.sum(d_argument * t[:, None], 0)
        d_shift += tl.sum(d_argument, 0)
        tl.store(d_t_ptr + tile * N + row, tl.sum(d_argument * rate, 1), row < N)
    d_arguments_ptr += ((tile % outputs) * blocks + block) * 2 * columns + j
    tl.store(d_arguments_ptr, d_rate, j < columns)
    tl.store(d_arguments_ptr + columns, d_shift, j < columns)
    if KIND == "waves":
        d_weight_ptr += block * size * columns
        tl.store(d_weight_ptr + (block + 1) * size * columns + at, d_sine_weight, is_weight)
    tl.store(d_weight_ptr + block * size * columns + at, d_weight, is_weight)


def learnable_time_embedding_backward(grad_embedding: Tensor, t: Tensor, *given) -> tuple[Tensor, ...]:
    t, tensors, eps = t.contiguous(), [contiguous(value) for value in given[:-1]], given[-1]
    sizes = sizes_of(t, *tensors)
    n, f, s = sizes["N"], sizes["F"], sizes["S"]
    wide = torch.promote_types(t.dtype, torch.float32)
    programs = triton.cdiv(n, sizes["ROWS"])
    d_parts, sums = t.new_empty(n, f + s, dtype=wide), t.new_zeros(programs, 4, f + s, dtype=wide)
    if n:
        launch(learnable_time_embedding_backward_parts_kernel, programs)(
            grad_embedding.contiguous(), t, *tensors, d_parts, sums, eps, **sizes
        )
    d_norm_weight, d_norm_bias, d_scale, d_bias = sums.sum(0)
    rate, phase, fourier_weight, _, spline_rate, spline_shift, base_weight, spline_weight, *_ = tensors
    waves = _through_features("waves", d_parts, 0, t, rate, phase, fourier_weight)
    flat = _through_features("tanh", d_parts, f, t, spline_rate, spline_shift, base_weight[..., None])
    bases = _through_features("bases", d_parts, f, t, spline_rate, spline_shift, spline_weight)
    d_t, d_frequency, d_phase, d_fourier_weight = waves
    d_spline_rate, d_spline_shift, d_base_weight = flat[1] + bases[1], flat[2] + bases[2], flat[3]
    gradients = d_frequency, d_phase, d_fourier_weight, d_bias[:f], d_spline_rate, d_spline_shift, d_base_weight[..., 0]
    gradients += bases[3], d_norm_weight, d_norm_bias, d_scale
    # Of their own memory: outputs of an op must not share any.
    return (d_t + flat[0] + bases[0]).to(t.dtype), *(
        t.new_empty(0) if value is None else gradient.to(t.dtype, copy=True)
        for gradient, value in zip(gradients, tensors, strict=True)
    )


def _through_features(
    kind: str, d_parts: Tensor, first_part: int, t: Tensor, rate: Tensor, shift: Tensor, weight: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of times, rates, shifts and weights [..., output, feature, function], through functions of `kind`."""
    n, count, functions = len(t), len(rate), weight.shape[-1]
    outputs = min(OUTPUTS, max(triton.next_power_of_2(max(count, 1)), 16))
    parts_of_outputs = triton.cdiv(count, outputs)
    tiles = parts_of_outputs * triton.cdiv(count * functions, COLUMNS)
    blocks = min(triton.cdiv(n, ROWS), max(MOST_PROGRAMS // max(tiles, 1), 1))
    d_t = d_parts.new_empty(tiles, n)
    d_arguments = d_parts.new_empty(parts_of_outputs * blocks, 2, count, functions)
    d_weight = d_parts.new_empty(blocks, *weight.shape)
    if tiles * blocks:
        launch(learnable_time_embedding_backward_features_kernel, tiles * blocks)(
            d_parts, t, rate, shift, weight, d_t, d_arguments, d_weight, n, count, first_part, d_parts.shape[1], blocks,
            KIND=kind, FUNCTIONS=functions, COLUMNS=COLUMNS, OUTPUTS=outputs, ROWS=ROWS, DTYPE=arithmetic_dtype(t),
            num_warps=4, num_stages=1,
        )  # fmt: skip
    return d_t.sum(0), *d_arguments.sum((0, 3)), d_weight.sum(0)
