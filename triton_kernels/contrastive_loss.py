"""Contrastive loss in Triton: strips of rows of logits by a library's product, what is done to a strip in one pass.

Forward, one program takes ROWS rows: it keeps their running maxima and sums of exponentials, and writes the logarithm
of the sums of its part of each column, which are summed afterwards. Backward, a strip is computed again and turned into
the gradient of the cosines in place, between the products.
"""

import torch
import triton
import triton.language as tl
from evkernels.triton_kernels.launch import arithmetic_dtype, launch
from torch import Tensor

from evkernels.reference.contrastive_loss import unit_rows, unit_rows_backward

# Rows of a strip, a multiple of ROWS; it is as long as there are columns.
STRIP = 1024
ROWS, COLUMNS = 16, 128


@triton.jit
def _logits(cosines_ptr, scale_ptr, i, j, count, total, DTYPE: tl.constexpr):
    """Addresses of a tile, where it is inside, and its logits, minus infinity outside."""
    at = cosines_ptr + i.to(tl.int64)[:, None] * total + j[None, :]
    inside = (i[:, None] < count) & (j[None, :] < total)
    logits = tl.load(at, inside, 0.0) * tl.load(scale_ptr).to(DTYPE)
    return at, inside, tl.where(inside, logits, -float("inf"))


@triton.jit
def contrastive_loss_forward_kernel(
    cosines_ptr, scale_ptr, rows_ptr, columns_ptr, count, total, pairs,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    i = program * ROWS + tl.arange(0, ROWS)
    top = tl.full((ROWS,), -float("inf"), DTYPE)
    sums = tl.zeros((ROWS,), DTYPE)
    for start in range(0, total, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        _, _, logits = _logits(cosines_ptr, scale_ptr, i, j, count, total, DTYPE)
        higher = tl.maximum(top, tl.max(logits, 1))
        sums = sums * tl.exp(top - higher) + tl.sum(tl.exp(logits - higher[:, None]), 1)
        top = higher
        if columns_ptr is not None:
            highest = tl.max(logits, 0)
            part = highest + tl.log(tl.sum(tl.exp(logits - highest[None, :]), 0))
            tl.store(columns_ptr + program * pairs + j, part, j < pairs)
    tl.store(rows_ptr + i, top + tl.log(sums), i < count)


@triton.jit
def contrastive_loss_backward_kernel(
    cosines_ptr, scale_ptr, rows_ptr, columns_ptr, first, count, total, pairs,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    of_row = tl.load(rows_ptr + i, i < count, 0.0)
    for start in range(0, total, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        at, inside, logits = _logits(cosines_ptr, scale_ptr, i, j, count, total, DTYPE)
        shares = tl.exp(logits - of_row[:, None])
        is_own = first + i[:, None] == j[None, :]
        if columns_ptr is None:
            shares -= tl.where(is_own, 1.0, 0.0)
        else:
            of_column = tl.load(columns_ptr + j, j < pairs, float("inf"))
            shares += tl.exp(logits - of_column[None, :]) - tl.where(is_own, 2.0, 0.0)
        tl.store(at, shares.to(DTYPE), inside)


def contrastive_loss(
    a: Tensor, b: Tensor, logit_scale: Tensor, queue: Tensor | None, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    p, q, scale = unit_rows(a), unit_rows(b, queue), logit_scale.to(_wide(a))
    rows = torch.empty(len(p), dtype=p.dtype, device=p.device)
    parts = p.new_empty((triton.cdiv(len(p), ROWS), len(p))) if symmetric else None
    for begin in range(0, len(p), STRIP):
        cosines = torch.mm(p[begin : begin + STRIP], q.T)
        part = parts[begin // ROWS :] if symmetric else None
        _run(contrastive_loss_forward_kernel, cosines, scale, rows[begin:], part, *cosines.shape, len(p))
    matching = scale * (p * q[: len(p)]).sum(1)
    loss, columns = (rows - matching).mean(), p.new_empty(0)
    if symmetric:
        columns = parts.logsumexp(0)
        loss = (loss + (columns - matching).mean()) / 2
    return loss.to(a.dtype), rows, columns


def contrastive_loss_backward(
    grad_loss: Tensor,
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    queue: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    symmetric: bool,
    need_a: bool,
    need_b: bool,
    need_scale: bool,
    need_queue: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    p, q, scale = unit_rows(a), unit_rows(b, queue), logit_scale.to(_wide(a))
    d_p, d_q = torch.zeros_like(p), torch.zeros_like(q)
    for begin in range(0, len(p), STRIP):
        strip = slice(begin, begin + STRIP)
        d_cosines = torch.mm(p[strip], q.T)
        sums = (rows[strip], columns if symmetric else None)
        _run(contrastive_loss_backward_kernel, d_cosines, scale, *sums, begin, *d_cosines.shape, len(p))
        if need_a or need_scale:
            torch.mm(d_cosines, q, out=d_p[strip])
        if need_b or need_queue:
            d_q.addmm_(d_cosines.T, p[strip])
    share = grad_loss.to(p.dtype) / (len(p) * (2 if symmetric else 1))
    nothing = a.new_empty(0)
    arriving = [scale * share * d for d in (d_p, d_q[: len(p)], d_q[len(p) :])]
    return (
        unit_rows_backward(arriving[0], a) if need_a else nothing,
        unit_rows_backward(arriving[1], b) if need_b else nothing,
        (share * (d_p * p).sum()).to(logit_scale.dtype) if need_scale else nothing,
        unit_rows_backward(arriving[2], queue) if need_queue and queue is not None else nothing,
    )


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _run(kernel, cosines: Tensor, *arguments) -> None:
    constants = {"DTYPE": arithmetic_dtype(cosines), "ROWS": ROWS, "COLUMNS": COLUMNS}
    launch(kernel, triton.cdiv(len(cosines), ROWS))(cosines, *arguments, **constants)
