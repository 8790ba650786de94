"""Contract of `event_histogram`: documentation, checks, schema and shape rule."""

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops import checks, event_columns, registration
from evkernels.reference.event_histogram import LARGEST_COUNT, counter_dtype


def event_histogram(
    x: Tensor,
    y: Tensor,
    t: Tensor,
    p: Tensor,
    *,
    bins: int,
    height: int,
    width: int,
    count_cutoff: int | None = None,
    dtype: torch.dtype = torch.uint8,
    offsets: Tensor | None = None,
    out_of_range: Literal["drop", "raise"] = "drop",
    pixel_map: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Events counted per polarity, time bin and pixel: RVT's stacked histogram.

    Equivalent to::

        x, y, t, p = x.long(), y.long(), t.long(), (p > 0).long()
        since, span = t - t.min(), (t.max() - t.min()).clamp(min=1)
        b = (since.float() / span.float() * bins).floor().clamp(max=bins - 1).long()
        cell = ((p * bins + b) * height + y) * width + x
        counts = torch.bincount(cell, minlength=2 * bins * height * width)
        histogram = counts.clamp(max=count_cutoff).to(dtype).view(2 * bins, height, width)

    Args:
        x: Columns [E], any integer dtype, 0 <= x < width.
        y: Rows [E], any integer dtype, 0 <= y < height.
        t: Timestamps [E], int64 or int32, in any unit and order. Sorted ones are counted faster, with the same result.
        p: Polarities [E], bool or any integer dtype: 1 is ON, 0 and -1 are OFF, other values are out of range.
        bins: Number of time bins, 1 to 2**24. They divide the time from the first to the last event of a window, events
            out of range included.
        height: Rows of the image, which are the sensor's unless there is a `pixel_map`.
        width: Columns of the image, likewise.
        count_cutoff: Counters stop at this value, at least 1; None means the largest count of `dtype`.
        dtype: Of the counters: uint8 counts to 255, int16 to 32767, int32 to 2**31 - 1, float32 to 2**24. Every further
            byte costs memory: with more than a few bins uint8 is the one to use.
        offsets: Cuts a batch of windows out of the events, int64 [B + 1]: window b is events offsets[b] to
            offsets[b + 1]. Starts with 0, ends with E, never decreases. None means one window and no batch dimension.
        out_of_range: "drop" leaves events out of range out. "raise" raises; on a GPU it waits for the result.
        pixel_map: Where the sensor's pixels lie in the image, int32 [H, W] of the sensor: pixel (x, y) counts in cell
            y' * width + x' = pixel_map[y, x] of the image; events of pixels whose entry is outside the image, such as
            -1, are left out and are not out of range. One table is any chain of flip, crop, downsampling, rectification
            and removal of pixels, see `evkernels.events.pixel_map`. None: the sensor is the image.
        out: Takes the result: contiguous, of its shape, dtype and device, no input among them. It is returned.

    Returns:
        `dtype` [2*bins, height, width], or [B, 2*bins, height, width] with `offsets`: the bins of OFF events first,
        then those of ON events. Zeros where a window has no events. Contiguous, never aliases the inputs.

    Raises:
        TypeError: if an argument is of another type or dtype.
        ValueError: if shapes or devices disagree, a number is out of its bounds, `offsets` is no partition (on a GPU
            only looked at with out_of_range="raise"; a wrong one gives wrong counts, never an invalid access), or with
            out_of_range="raise" if an event is out of range.

    Deterministic; the same result for every backend and number of threads. Not differentiable. Times are subtracted as
    int64 and divided in float32 in RVT's order of operations, so that every event falls into RVT's bin. RVT counts in
    uint8 and wraps at 256, or in int16 and wraps at 32768; these counters stop at `count_cutoff`. Contiguous inputs are
    read in place, others are copied first.
    Source: Gehrig and Scaramuzza 2023 (arXiv:2212.05598), `StackedHistogram`.
    """
    largest = _largest_count(dtype)
    cutoff = largest if count_cutoff is None else count_cutoff
    event_columns.check_events(x, y, t, p)
    for name, value, limit in (("bins", bins, 2**24), ("height", height, 2**31 - 1), ("width", width, 2**31 - 1)):
        checks.check_int(name, value, 1, limit)
    checks.check_int("count_cutoff", cutoff, 1, largest)
    if out_of_range not in ("drop", "raise"):
        raise ValueError(f'out_of_range must be "drop" or "raise", got {out_of_range!r}')
    if offsets is not None:
        event_columns.check_offsets(offsets, x, look=out_of_range == "raise")
    if pixel_map is None and out is None and (dtype != torch.float32 or registration.needs_reference()):
        histogram, dropped = _forward(x, y, t, p, offsets, bins, height, width, cutoff, 8 * dtype.itemsize)
        histogram = histogram.to(dtype)
    else:
        windows = () if offsets is None else (offsets.shape[0] - 1,)
        shape = (*windows, 2 * bins, height, width)
        if pixel_map is not None:
            event_columns.check_pixel_map(pixel_map, x)
        if out is not None:
            event_columns.check_out(out, x, shape, dtype)
        histogram = torch.empty(shape, dtype=dtype, device=x.device) if out is None else out
        dropped = _into(x, y, t, p, offsets, pixel_map, histogram, bins, cutoff)
    if out_of_range == "raise":
        event_columns.raise_if_dropped(dropped, x, y, p, height, width, pixel_map)
    return histogram


def _largest_count(dtype: object) -> int:
    if dtype not in LARGEST_COUNT:
        raise TypeError(f"dtype must be {' or '.join(str(counter) for counter in LARGEST_COUNT)}, got {dtype}")
    return LARGEST_COUNT[dtype]


def _fake(x, y, t, p, offsets, bins, height, width, count_cutoff, bits):
    windows = () if offsets is None else (offsets.shape[0] - 1,)
    return (
        torch.empty((*windows, 2 * bins, height, width), dtype=counter_dtype(bits), device=x.device),
        torch.empty((), dtype=torch.int64, device=x.device),
    )


_forward = registration.define(
    "event_histogram(Tensor x, Tensor y, Tensor t, Tensor p, Tensor? offsets, SymInt bins, SymInt height, SymInt width,"
    " int count_cutoff, int bits) -> (Tensor histogram, Tensor dropped)",
    reference=reference.event_histogram_kernel,
    fake=_fake,
)

_into = registration.define(
    "event_histogram_into(Tensor x, Tensor y, Tensor t, Tensor p, Tensor? offsets, Tensor? pixel_map, Tensor(a!) out,"
    " SymInt bins, int count_cutoff) -> Tensor dropped",
    reference=reference.event_histogram_into_kernel,
    fake=lambda x, *rest: x.new_empty((), dtype=torch.int64),
)
registration.define_composed(_into, partial(reference.event_histogram_into_kernel, kernel=_forward))
