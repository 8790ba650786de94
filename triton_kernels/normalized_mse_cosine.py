"""Mean squared difference and cosine of normalised rows in Triton.

One program takes ROWS rows and reads them twice, the second time from the cache: for their lengths and their product,
then for what is made of them. Results of rows are added by PyTorch, always in one order.
"""

import torch
import triton
import triton.language as tl
from evkernels.triton_kernels.launch import arithmetic_dtype, launch
from torch import Tensor

ROWS, COLUMNS = 4, 256


@triton.jit
def _pair(a_ptr, b_ptr, i, j, count, size, DTYPE: tl.constexpr):
    """Addresses of a tile, where it is inside, and the values of both, 0 outside."""
    at = i[:, None] * size + j[None, :]
    inside = (i[:, None] < count) & (j[None, :] < size)
    return at, inside, tl.load(a_ptr + at, inside, 0.0).to(DTYPE), tl.load(b_ptr + at, inside, 0.0).to(DTYPE)


@triton.jit
def _factors(a_ptr, b_ptr, i, count, size, DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """What brings each row to length 1, where a length below 1e-12 counts as that, and the cosines."""
    xx = tl.zeros((ROWS,), DTYPE)
    yy = tl.zeros((ROWS,), DTYPE)
    xy = tl.zeros((ROWS,), DTYPE)
    for start in range(0, size, COLUMNS):
        _, _, x, y = _pair(a_ptr, b_ptr, i, start + tl.arange(0, COLUMNS), count, size, DTYPE)
        xx += tl.sum(x * x, 1)
        yy += tl.sum(y * y, 1)
        xy += tl.sum(x * y, 1)
    # NaN stays, as in clamp_min.
    x_factor = 1.0 / tl.maximum(tl.sqrt(xx), 1e-12, propagate_nan=tl.PropagateNan.ALL)
    y_factor = 1.0 / tl.maximum(tl.sqrt(yy), 1e-12, propagate_nan=tl.PropagateNan.ALL)
    return x_factor, y_factor, xy * x_factor * y_factor


@triton.jit
def normalized_mse_cosine_kernel(
    a_ptr, b_ptr, squares_ptr, cosines_ptr, count, size,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x_factor, y_factor, cosine = _factors(a_ptr, b_ptr, i, count, size, DTYPE, ROWS, COLUMNS)
    square = tl.zeros((ROWS,), DTYPE)
    for start in range(0, size, COLUMNS):
        _, _, x, y = _pair(a_ptr, b_ptr, i, start + tl.arange(0, COLUMNS), count, size, DTYPE)
        difference = x * x_factor[:, None] - y * y_factor[:, None]
        square += tl.sum(difference * difference, 1)
    tl.store(squares_ptr + i, square, i < count)
    tl.store(cosines_ptr + i, cosine, i < count)


@triton.jit
def normalized_mse_cosine_backward_kernel(
    square_share_ptr, cosine_share_ptr, a_ptr, b_ptr, d_a_ptr, d_b_ptr, count, size,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x_factor, y_factor, cosine = _factors(a_ptr, b_ptr, i, count, size, DTYPE, ROWS, COLUMNS)
    own = tl.load(square_share_ptr)
    other = tl.load(cosine_share_ptr) - own
    # Orthogonal to p, the gradient at p is other * (q - cosine * p); a row that is too short was divided by a constant.
    along_x = tl.where(x_factor * 1e-12 < 1.0, other * cosine, -own)
    along_y = tl.where(y_factor * 1e-12 < 1.0, other * cosine, -own)
    for start in range(0, size, COLUMNS):
        at, inside, x, y = _pair(a_ptr, b_ptr, i, start + tl.arange(0, COLUMNS), count, size, DTYPE)
        p = x * x_factor[:, None]
        q = y * y_factor[:, None]
        d_x = (q * other - p * along_x[:, None]) * x_factor[:, None]
        d_y = (p * other - q * along_y[:, None]) * y_factor[:, None]
        tl.store(d_a_ptr + at, d_x.to(d_a_ptr.dtype.element_ty), inside)
        tl.store(d_b_ptr + at, d_y.to(d_b_ptr.dtype.element_ty), inside)


def normalized_mse_cosine(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    a, b = a.contiguous(), b.contiguous()
    squares, cosines = a.new_empty((2, len(a)), dtype=torch.promote_types(a.dtype, torch.float32))
    _run(normalized_mse_cosine_kernel, a, a, b, squares, cosines)
    return (squares.sum() / a.numel()).to(a.dtype), cosines.mean().to(a.dtype)


def normalized_mse_cosine_backward(
    grad_mse: Tensor | None, grad_cosine: Tensor | None, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    a, b = a.contiguous(), b.contiguous()
    d_a, d_b = torch.empty_like(a), torch.empty_like(b)
    nothing = a.new_zeros((), dtype=torch.promote_types(a.dtype, torch.float32))
    square_share = nothing if grad_mse is None else grad_mse.to(nothing.dtype) * 2 / a.numel()
    cosine_share = nothing if grad_cosine is None else grad_cosine.to(nothing.dtype) / len(a)
    _run(normalized_mse_cosine_backward_kernel, a, square_share, cosine_share, a, b, d_a, d_b)
    return d_a, d_b


def _run(kernel, a: Tensor, *arguments: Tensor) -> None:
    constants = {"DTYPE": arithmetic_dtype(a), "ROWS": ROWS, "COLUMNS": COLUMNS}
    launch(kernel, triton.cdiv(len(a), ROWS))(*arguments, *a.shape, **constants)
