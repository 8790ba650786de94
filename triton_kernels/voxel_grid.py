"""Voxel grids in Triton: one program adds BLOCK events, each to two bins and, for sub-pixel x and y, to four pixels.

Windows, their first and last times and the two columns of every event, position in time and value, are computed by
PyTorch as in the reference; the kernel fuses what dominates there, the up to eight scattered additions. It adds floats
by atomics; under torch.use_deterministic_algorithms multiples of 2**-32 as integers, converted afterwards.
"""

import torch
import triton
import triton.language as tl
from evkernels.triton_kernels.launch import launch
from torch import Tensor

from evkernels.reference.event_histogram import window_of_event
from evkernels.reference.voxel_grid import CONVENTIONS, position_in_time, values_of_events

BLOCK = 512


@triton.jit
def voxel_grid_add_kernel(
    x_ptr, y_ptr, p_ptr, position_ptr, value_ptr, valid_ptr, window_ptr, sums_ptr,
    events, bins, height, width,
    HARD: tl.constexpr, CLAMPED: tl.constexpr, SPLIT: tl.constexpr, SUB_PIXEL: tl.constexpr, FIXED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    event = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = event < events
    mask = mask & (tl.load(valid_ptr + event, mask, other=0) != 0)
    value = tl.load(value_ptr + event, mask, other=0)
    position = tl.load(position_ptr + event, mask, other=0)
    position = tl.where(position > -2, tl.minimum(position, tl.cast(bins + 1, tl.float64)), -2.0)
    bin = tl.floor(position).to(tl.int64)
    if HARD:
        bin = tl.minimum(bin, bins - 1)
        past = tl.zeros_like(position).to(value.dtype)
    elif CLAMPED:
        bin = tl.maximum(tl.minimum(bin, bins - 1), 0)
        past = tl.where(bin == bins - 1, 0.0, tl.abs(position - bin.to(tl.float64))).to(value.dtype)
    else:
        past = (position - bin.to(tl.float64)).to(value.dtype)
    channel = tl.load(window_ptr + event, mask, other=0) * bins
    if SPLIT:
        off = tl.load(p_ptr + event, mask, other=0).to(tl.int64) <= 0
        channel = 2 * channel + tl.where(off, bins, 0)
    x = tl.load(x_ptr + event, mask, other=0)
    y = tl.load(y_ptr + event, mask, other=0)
    column = tl.floor(x).to(tl.int64) if SUB_PIXEL else x.to(tl.int64)
    row = tl.floor(y).to(tl.int64) if SUB_PIXEL else y.to(tl.int64)
    past_x = (x - column.to(x.dtype)).to(value.dtype) if SUB_PIXEL else tl.zeros_like(value)
    past_y = (y - row.to(y.dtype)).to(value.dtype) if SUB_PIXEL else tl.zeros_like(value)
    for upper in tl.static_range(1 if HARD else 2):
        of_time = value * past if upper == 1 else value * (1 - past)
        in_time = mask & (bin + upper >= 0) & (bin + upper < bins)
        for below in tl.static_range(2 if SUB_PIXEL else 1):
            of_row = of_time * past_y if below == 1 else of_time * (1 - past_y)
            in_row = in_time & (row + below >= 0) & (row + below < height)
            for right in tl.static_range(2 if SUB_PIXEL else 1):
                of_cell = of_row * past_x if right == 1 else of_row * (1 - past_x)
                inside = in_row & (column + right >= 0) & (column + right < width)
                cell = ((channel + bin + upper) * height + row + below) * width + column + right
                if FIXED:
                    scaled = of_cell.to(tl.float64) * 4294967296.0
                    of_cell = (scaled + tl.where(scaled < 0, -0.5, 0.5)).to(tl.int64)
                tl.atomic_add(sums_ptr + cell, of_cell, mask=inside, sem="relaxed")


def voxel_grid(
    x: Tensor, y: Tensor, t: Tensor, p: Tensor, weight: Tensor | None, offsets: Tensor | None, bins: int, height: int,
    width: int, convention: str, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rule = CONVENTIONS[convention]
    channels = 2 * bins if rule.split else bins
    windows = 1 if offsets is None else offsets.numel() - 1
    shape = (channels, height, width) if offsets is None else (windows, channels, height, width)
    dtype = torch.float32 if weight is None else weight.dtype
    if x.numel() == 0:
        return torch.zeros(shape, dtype=dtype, device=x.device), torch.zeros((), dtype=torch.int64, device=x.device)
    window = window_of_event(t, offsets)
    value, valid = values_of_events(x, y, p, weight, height, width, rule)
    position = position_in_time(t, window, windows, bins, rule)[0]
    fixed = deterministic and weight is None
    sums = torch.zeros(shape, dtype=torch.int64 if fixed else dtype, device=x.device)
    p = p.view(torch.uint8) if p.dtype == torch.bool else p
    launch(voxel_grid_add_kernel, triton.cdiv(x.numel(), BLOCK))(
        x.contiguous(), y.contiguous(), p.contiguous(), position, value.contiguous(), valid.view(torch.uint8),
        window, sums, x.numel(), bins, height, width,
        HARD=rule.ends == "hard", CLAMPED=rule.ends == "clamp", SPLIT=rule.split,
        SUB_PIXEL=x.is_floating_point(), FIXED=fixed, BLOCK=BLOCK,
    )  # fmt: skip
    return (sums.double() * 2.0**-32).float() if fixed else sums, (~valid).sum()
