"""ConvLSTM gates in Triton: one program takes BLOCK consecutive elements of the state, see rows.py."""

import torch
import triton
import triton.language as tl
from evkernels.triton_kernels.launch import arithmetic_dtype, in_layout, inner_size, launch
from evkernels.triton_kernels.math import sigmoid, tanh
from evkernels.triton_kernels.rows import BLOCK, row_offsets
from torch import Tensor

from evkernels.ops.registration import common_layout


@triton.jit
def lstm_gates_forward_kernel(
    gates_ptr, c_ptr, h_ptr, c_next_ptr, inner, total,
    I: tl.constexpr, F: tl.constexpr, G: tl.constexpr, O: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    element, gate, mask = row_offsets(inner, total, 4, BLOCK)
    stride = tl.cast(inner, tl.int64)
    i = sigmoid(tl.load(gates_ptr + gate + I * stride, mask).to(DTYPE))
    f = sigmoid(tl.load(gates_ptr + gate + F * stride, mask).to(DTYPE))
    g = tanh(tl.load(gates_ptr + gate + G * stride, mask).to(DTYPE))
    o = sigmoid(tl.load(gates_ptr + gate + O * stride, mask).to(DTYPE))
    c_next = f * tl.load(c_ptr + element, mask).to(DTYPE) + i * g
    tl.store(h_ptr + element, o * tanh(c_next), mask)
    tl.store(c_next_ptr + element, c_next, mask)


@triton.jit
def lstm_gates_backward_kernel(
    d_h_ptr, d_c_next_ptr, gates_ptr, c_ptr, d_gates_ptr, d_c_ptr, inner, total,
    I: tl.constexpr, F: tl.constexpr, G: tl.constexpr, O: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    element, gate, mask = row_offsets(inner, total, 4, BLOCK)
    stride = tl.cast(inner, tl.int64)
    i = sigmoid(tl.load(gates_ptr + gate + I * stride, mask).to(DTYPE))
    f = sigmoid(tl.load(gates_ptr + gate + F * stride, mask).to(DTYPE))
    g = tanh(tl.load(gates_ptr + gate + G * stride, mask).to(DTYPE))
    o = sigmoid(tl.load(gates_ptr + gate + O * stride, mask).to(DTYPE))
    c = tl.load(c_ptr + element, mask).to(DTYPE)
    tanh_c = tanh(f * c + i * g)
    d_h = tl.zeros_like(c)
    if d_h_ptr is not None:
        d_h = tl.load(d_h_ptr + element, mask).to(DTYPE)
    d_cell = d_h * o * (1.0 - tanh_c * tanh_c)
    if d_c_next_ptr is not None:
        d_cell += tl.load(d_c_next_ptr + element, mask).to(DTYPE)
    tl.store(d_gates_ptr + gate + I * stride, d_cell * g * i * (1.0 - i), mask)
    tl.store(d_gates_ptr + gate + F * stride, d_cell * c * f * (1.0 - f), mask)
    tl.store(d_gates_ptr + gate + G * stride, d_cell * i * (1.0 - g * g), mask)
    tl.store(d_gates_ptr + gate + O * stride, d_h * tanh_c * o * (1.0 - o), mask)
    tl.store(d_c_ptr + element, d_cell * f, mask)


def lstm_gates(gates: Tensor, c: Tensor, order: str) -> tuple[Tensor, Tensor]:
    layout = common_layout(gates)
    gates, c = in_layout(gates, layout), in_layout(c, layout)
    h = torch.empty_like(c, dtype=gates.dtype, memory_format=layout)
    c_next = torch.empty_like(c, memory_format=layout)
    if c.numel():
        launch(lstm_gates_forward_kernel, triton.cdiv(c.numel(), BLOCK))(
            gates, c, h, c_next, inner_size(c, layout), c.numel(), **_constants(order, gates)
        )
    return h, c_next


def lstm_gates_backward(
    grad_h: Tensor | None, grad_c_next: Tensor | None, gates: Tensor, c: Tensor, order: str
) -> tuple[Tensor, Tensor]:
    layout = common_layout(gates)
    grad_h, grad_c_next = in_layout(grad_h, layout), in_layout(grad_c_next, layout)
    gates, c = in_layout(gates, layout), in_layout(c, layout)
    grad_gates = torch.empty_like(gates, memory_format=layout)
    grad_c = torch.empty_like(c, memory_format=layout)
    if c.numel():
        launch(lstm_gates_backward_kernel, triton.cdiv(c.numel(), BLOCK))(
            grad_h, grad_c_next, gates, c, grad_gates, grad_c, inner_size(c, layout), c.numel(),
            **_constants(order, gates),
        )  # fmt: skip
    return grad_gates, grad_c


def _constants(order: str, gates: Tensor) -> dict:
    blocks = {name.upper(): order.index(name) for name in "ifgo"}
    return {**blocks, "DTYPE": arithmetic_dtype(gates), "BLOCK": BLOCK}
