"""ConvGRU gates in Triton: one program takes BLOCK consecutive elements of the state, see rows.py."""

import torch
import triton
import triton.language as tl
from evkernels.triton_kernels.launch import arithmetic_dtype, in_layout, inner_size, launch
from evkernels.triton_kernels.math import sigmoid, tanh
from evkernels.triton_kernels.rows import BLOCK, row_offsets
from torch import Tensor

from evkernels.ops.registration import common_layout


@triton.jit
def _sum(x_ptr, h_ptr, offset, mask, DTYPE: tl.constexpr):
    return tl.load(x_ptr + offset, mask).to(DTYPE) + tl.load(h_ptr + offset, mask).to(DTYPE)


@triton.jit
def gru_gates_forward_kernel(
    x_gates_ptr, h_gates_ptr, h_ptr, h_next_ptr, inner, total,
    Z: tl.constexpr, R: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    element, gate, mask = row_offsets(inner, total, 3, BLOCK)
    stride = tl.cast(inner, tl.int64)
    h = tl.load(h_ptr + element, mask).to(DTYPE)
    z = sigmoid(_sum(x_gates_ptr, h_gates_ptr, gate + Z * stride, mask, DTYPE))
    r = sigmoid(_sum(x_gates_ptr, h_gates_ptr, gate + R * stride, mask, DTYPE))
    n = tanh(_sum(x_gates_ptr, h_gates_ptr, gate + N * stride, mask, DTYPE) + r * h)
    tl.store(h_next_ptr + element, (1.0 - z) * h + z * n, mask)


@triton.jit
def gru_gates_backward_kernel(
    d_h_next_ptr, x_gates_ptr, h_gates_ptr, h_ptr, d_gates_ptr, d_h_ptr, inner, total,
    Z: tl.constexpr, R: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    element, gate, mask = row_offsets(inner, total, 3, BLOCK)
    stride = tl.cast(inner, tl.int64)
    h = tl.load(h_ptr + element, mask).to(DTYPE)
    d_h_next = tl.load(d_h_next_ptr + element, mask).to(DTYPE)
    z = sigmoid(_sum(x_gates_ptr, h_gates_ptr, gate + Z * stride, mask, DTYPE))
    r = sigmoid(_sum(x_gates_ptr, h_gates_ptr, gate + R * stride, mask, DTYPE))
    n = tanh(_sum(x_gates_ptr, h_gates_ptr, gate + N * stride, mask, DTYPE) + r * h)
    d_n = d_h_next * z * ((1.0 - n) * (1.0 + n))
    tl.store(d_gates_ptr + gate + Z * stride, d_h_next * (n - h) * z * (1.0 - z), mask)
    tl.store(d_gates_ptr + gate + R * stride, d_n * h * r * (1.0 - r), mask)
    tl.store(d_gates_ptr + gate + N * stride, d_n, mask)
    tl.store(d_h_ptr + element, d_h_next * (1.0 - z) + d_n * r, mask)


@triton.jit
def gru_reset_forward_kernel(
    zr_ptr, h_ptr, z_ptr, rh_ptr, inner, total,
    Z: tl.constexpr, R: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    element, gate, mask = row_offsets(inner, total, 2, BLOCK)
    stride = tl.cast(inner, tl.int64)
    r = sigmoid(tl.load(zr_ptr + gate + R * stride, mask).to(DTYPE))
    tl.store(z_ptr + element, sigmoid(tl.load(zr_ptr + gate + Z * stride, mask).to(DTYPE)), mask)
    tl.store(rh_ptr + element, r * tl.load(h_ptr + element, mask).to(DTYPE), mask)


@triton.jit
def gru_reset_backward_kernel(
    d_z_ptr, d_rh_ptr, zr_ptr, h_ptr, d_zr_ptr, d_h_ptr, inner, total,
    Z: tl.constexpr, R: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    element, gate, mask = row_offsets(inner, total, 2, BLOCK)
    stride = tl.cast(inner, tl.int64)
    z = sigmoid(tl.load(zr_ptr + gate + Z * stride, mask).to(DTYPE))
    r = sigmoid(tl.load(zr_ptr + gate + R * stride, mask).to(DTYPE))
    d_z = tl.zeros_like(z)
    d_rh = tl.zeros_like(r)
    if d_z_ptr is not None:
        d_z = tl.load(d_z_ptr + element, mask).to(DTYPE)
    if d_rh_ptr is not None:
        d_rh = tl.load(d_rh_ptr + element, mask).to(DTYPE)
    h = tl.load(h_ptr + element, mask).to(DTYPE)
    tl.store(d_zr_ptr + gate + Z * stride, d_z * z * (1.0 - z), mask)
    tl.store(d_zr_ptr + gate + R * stride, d_rh * h * r * (1.0 - r), mask)
    tl.store(d_h_ptr + element, d_rh * r, mask)


@triton.jit
def gru_update_forward_kernel(z_ptr, n_ptr, h_ptr, h_next_ptr, total, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < total
    z = tl.load(z_ptr + element, mask).to(DTYPE)
    n = tanh(tl.load(n_ptr + element, mask).to(DTYPE))
    tl.store(h_next_ptr + element, (1.0 - z) * tl.load(h_ptr + element, mask).to(DTYPE) + z * n, mask)


@triton.jit
def gru_update_backward_kernel(
    d_h_next_ptr, z_ptr, n_ptr, h_ptr, d_z_ptr, d_n_ptr, d_h_ptr, total, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < total
    d_h_next = tl.load(d_h_next_ptr + element, mask).to(DTYPE)
    z = tl.load(z_ptr + element, mask).to(DTYPE)
    n = tanh(tl.load(n_ptr + element, mask).to(DTYPE))
    tl.store(d_z_ptr + element, d_h_next * (n - tl.load(h_ptr + element, mask).to(DTYPE)), mask)
    tl.store(d_n_ptr + element, d_h_next * z * ((1.0 - n) * (1.0 + n)), mask)
    tl.store(d_h_ptr + element, d_h_next * (1.0 - z), mask)


def gru_gates(x_gates: Tensor, h_gates: Tensor, h: Tensor, order: str) -> Tensor:
    layout = common_layout(x_gates)
    x_gates, h_gates, h = (in_layout(tensor, layout) for tensor in (x_gates, h_gates, h))
    h_next = torch.empty_like(h, memory_format=layout)
    _launch(gru_gates_forward_kernel, x_gates, h_gates, h, h_next, **_rows(h, layout, order))
    return h_next


def gru_gates_backward(
    grad_h_next: Tensor, x_gates: Tensor, h_gates: Tensor, h: Tensor, order: str
) -> tuple[Tensor, Tensor]:
    layout = common_layout(x_gates)
    grad_h_next, x_gates, h_gates, h = (in_layout(tensor, layout) for tensor in (grad_h_next, x_gates, h_gates, h))
    grad_gates = torch.empty_like(x_gates, memory_format=layout)
    grad_h = torch.empty_like(h, memory_format=layout)
    rows = _rows(h, layout, order)
    _launch(gru_gates_backward_kernel, grad_h_next, x_gates, h_gates, h, grad_gates, grad_h, **rows)
    return grad_gates, grad_h


def gru_reset(zr: Tensor, h: Tensor, order: str) -> tuple[Tensor, Tensor]:
    layout = common_layout(zr)
    zr, h = in_layout(zr, layout), in_layout(h, layout)
    z = torch.empty_like(h, dtype=zr.dtype, memory_format=layout)
    rh = torch.empty_like(z, memory_format=layout)
    _launch(gru_reset_forward_kernel, zr, h, z, rh, **_rows(h, layout, order))
    return z, rh


def gru_reset_backward(
    grad_z: Tensor | None, grad_rh: Tensor | None, zr: Tensor, h: Tensor, order: str
) -> tuple[Tensor, Tensor]:
    layout = common_layout(zr)
    grad_z, grad_rh, zr, h = (in_layout(tensor, layout) for tensor in (grad_z, grad_rh, zr, h))
    grad_zr = torch.empty_like(zr, memory_format=layout)
    grad_h = torch.empty_like(h, memory_format=layout)
    _launch(gru_reset_backward_kernel, grad_z, grad_rh, zr, h, grad_zr, grad_h, **_rows(h, layout, order))
    return grad_zr, grad_h


def gru_update(z: Tensor, n: Tensor, h: Tensor) -> Tensor:
    layout = common_layout(z)
    z, n, h = (in_layout(tensor, layout) for tensor in (z, n, h))
    h_next = torch.empty_like(h, memory_format=layout)
    _launch(gru_update_forward_kernel, z, n, h, h_next)
    return h_next


def gru_update_backward(grad_h_next: Tensor, z: Tensor, n: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    layout = common_layout(z)
    grad_h_next, z, n, h = (in_layout(tensor, layout) for tensor in (grad_h_next, z, n, h))
    gradients = tuple(torch.empty_like(tensor, memory_format=layout) for tensor in (z, n, h))
    _launch(gru_update_backward_kernel, grad_h_next, z, n, h, *gradients)
    return gradients


def _rows(h: Tensor, layout: torch.memory_format, order: str) -> dict:
    """The arguments of kernels on rows: their length and the position of each gate's block."""
    return {"inner": inner_size(h, layout), **{name.upper(): order.index(name) for name in order}}


def _launch(kernel, *tensors: Tensor | None, **arguments) -> None:
    """Runs `kernel` over the elements of the last tensor, which has the state's shape."""
    state = tensors[-1]
    if state.numel():
        launch(kernel, triton.cdiv(state.numel(), BLOCK))(
            *tensors, total=state.numel(), DTYPE=arithmetic_dtype(state), BLOCK=BLOCK, **arguments
        )
