"""Definition of the stacked event histogram in plain PyTorch: exact counts in int32, clamped at the end."""

import torch
from torch import Tensor

from evkernels.reference.pixel_map import look_up

# What counters of each dtype hold: float32 counts one by one up to 2**24.
LARGEST_COUNT = {torch.uint8: 255, torch.int16: 2**15 - 1, torch.int32: 2**31 - 1, torch.float32: 2**24}


def event_histogram(
    x, y, t, p, *, bins, height, width, count_cutoff=None, dtype=torch.uint8, offsets=None, out_of_range="drop",
    pixel_map=None, out=None,
) -> Tensor:  # fmt: skip
    windows = () if offsets is None else (offsets.numel() - 1,)
    out = torch.empty(*windows, 2 * bins, height, width, dtype=dtype, device=x.device) if out is None else out
    cutoff = LARGEST_COUNT[out.dtype] if count_cutoff is None else count_cutoff
    dropped = event_histogram_into_kernel(x, y, t, p, offsets, pixel_map, out, bins, cutoff)
    if out_of_range == "raise" and dropped:
        raise ValueError(f"{int(dropped)} events are out of range")
    return out


def event_histogram_kernel(
    x: Tensor, y: Tensor, t: Tensor, p: Tensor, offsets: Tensor | None, bins: int, height: int, width: int,
    cutoff: int, bits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The histogram, uint8, int16 or int32 as `bits` says, and the number of dropped events []."""
    x, y, t, p = (column.to(torch.int64) for column in (x, y, t, p))
    window = window_of_event(t, offsets)
    windows = 1 if offsets is None else offsets.numel() - 1
    first, last = window_times(t, window, windows)
    # The order of these float32 operations decides which bin an event on a border falls into.
    span = (last - first).clamp(min=1)[window].float()
    time_bin = ((t - first[window]).float() / span * bins).floor().clamp(0, bins - 1).long()

    valid = (x >= 0) & (x < width) & (y >= 0) & (y < height) & (p >= -1) & (p <= 1)
    cell = (((2 * window + (p > 0)) * bins + time_bin) * height + y) * width + x
    cells = windows * 2 * bins * height * width
    # Dropped events are counted in one cell too many.
    counts = torch.zeros(cells + 1, dtype=torch.int32, device=x.device)
    counts.scatter_add_(0, torch.where(valid, cell, cells), torch.ones_like(cell, dtype=torch.int32))
    shape = (2 * bins, height, width) if offsets is None else (windows, 2 * bins, height, width)
    return counts[:cells].clamp(max=cutoff).to(counter_dtype(bits)).view(shape), (~valid).sum()


def event_histogram_into_kernel(
    x: Tensor, y: Tensor, t: Tensor, p: Tensor, offsets: Tensor | None, pixel_map: Tensor | None, out: Tensor,
    bins: int, cutoff: int, kernel=event_histogram_kernel,
) -> Tensor:  # fmt: skip
    """The histogram, through a map of pixels, goes into `out`; returns the number of dropped events []."""
    height, width = out.shape[-2:]
    x, y, dropped = look_up(x, y, p, pixel_map, height, width)
    bits = 8 * out.dtype.itemsize
    histogram, outside = kernel(x, y, t, p, offsets, bins, height, width, cutoff, bits)
    out.copy_(histogram)
    return outside if dropped is None else dropped


def counter_dtype(bits: int) -> torch.dtype:
    return {8: torch.uint8, 16: torch.int16, 32: torch.int32}[bits]


def window_times(t: Tensor, window: Tensor, windows: int) -> tuple[Tensor, Tensor]:
    """First and last time of every window [B], anything where it has no events."""
    limits = torch.iinfo(t.dtype)
    first = t.new_full((windows,), limits.max).scatter_reduce(0, window, t, "amin")
    return first, t.new_full((windows,), limits.min).scatter_reduce(0, window, t, "amax")


def window_of_event(t: Tensor, offsets: Tensor | None) -> Tensor:
    """Index of the window that each event belongs to, int64 [E]."""
    if offsets is None:
        return torch.zeros_like(t, dtype=torch.int64)
    events = torch.arange(t.numel(), device=t.device)
    windows = offsets.numel() - 1
    return torch.bucketize(events, offsets.narrow(0, 1, windows), right=True).clamp(max=max(windows - 1, 0))
