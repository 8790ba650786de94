"""Stacked event histograms in Triton: one program counts BLOCK events with int32 atomics, a second kernel narrows.

Integer atomics make the result independent of their order. The cost is 4 bytes per cell to clear, count and read back,
where the CUDA kernels count in the output's own bytes, which Triton cannot: it has no atomics below 32 bits.
"""

import torch
import triton
import triton.language as tl
from evkernels.triton_kernels.launch import launch
from torch import Tensor

from evkernels.reference.event_histogram import counter_dtype, window_of_event, window_times

BLOCK = 1024


@triton.jit
def event_histogram_count_kernel(
    x_ptr, y_ptr, t_ptr, p_ptr, window_ptr, first_ptr, last_ptr, counts_ptr, dropped_ptr,
    events, bins, height, width, BLOCK: tl.constexpr,
):  # fmt: skip
    event = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = event < events
    x = tl.load(x_ptr + event, mask).to(tl.int64)
    y = tl.load(y_ptr + event, mask).to(tl.int64)
    p = tl.load(p_ptr + event, mask).to(tl.int64)
    t = tl.load(t_ptr + event, mask).to(tl.int64)
    window = tl.zeros_like(event)
    if window_ptr is not None:
        window = tl.load(window_ptr + event, mask, other=0)
    first = tl.load(first_ptr + window)
    span = tl.maximum(tl.load(last_ptr + window) - first, 1).to(tl.float32)
    # Triton's own division is off by a unit now and then, which would move events on the border of a bin.
    time_bin = tl.math.div_rn((t - first).to(tl.float32), span) * tl.cast(bins, tl.float32)
    time_bin = tl.maximum(tl.minimum(time_bin, tl.cast(bins, tl.float32) - 1), 0).to(tl.int64)
    valid = mask & (x >= 0) & (x < width) & (y >= 0) & (y < height) & (p >= -1) & (p <= 1)
    cell = (((2 * window + (p > 0)) * bins + time_bin) * height + y) * width + x
    tl.atomic_add(counts_ptr + cell, 1, mask=valid, sem="relaxed")
    tl.atomic_add(dropped_ptr, tl.sum((mask & ~valid).to(tl.int64), axis=0), sem="relaxed")


@triton.jit
def event_histogram_narrow_kernel(counts_ptr, histogram_ptr, cells, cutoff, BLOCK: tl.constexpr):
    cell = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = cell < cells
    tl.store(histogram_ptr + cell, tl.minimum(tl.load(counts_ptr + cell, mask), cutoff), mask)


def event_histogram(
    x: Tensor, y: Tensor, t: Tensor, p: Tensor, offsets: Tensor | None, bins: int, height: int, width: int,
    cutoff: int, bits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = (2 * bins, height, width) if offsets is None else (offsets.numel() - 1, 2 * bins, height, width)
    dropped = torch.zeros((), dtype=torch.int64, device=x.device)
    if x.numel() == 0:
        return torch.zeros(shape, dtype=counter_dtype(bits), device=x.device), dropped
    x, y, t = x.contiguous(), y.contiguous(), t.contiguous()
    p = (p.view(torch.uint8) if p.dtype == torch.bool else p).contiguous()
    window = None if offsets is None else window_of_event(t, offsets)
    first, last = t.aminmax() if window is None else window_times(t, window, shape[0])
    counts = torch.zeros(shape, dtype=torch.int32, device=x.device)
    histogram = torch.empty(shape, dtype=counter_dtype(bits), device=x.device)
    launch(event_histogram_count_kernel, triton.cdiv(x.numel(), BLOCK))(
        x, y, t, p, window, first.long(), last.long(), counts, dropped, x.numel(), bins, height, width, BLOCK=BLOCK
    )
    launch(event_histogram_narrow_kernel, triton.cdiv(counts.numel(), BLOCK))(
        counts, histogram, counts.numel(), cutoff, BLOCK=BLOCK
    )
    return histogram, dropped
