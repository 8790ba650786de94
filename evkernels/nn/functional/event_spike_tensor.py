"""The event spike tensor (EST) with any function of the distance in time, learnt or not.

Plain PyTorch: a value for every event and bin, whatever function makes it, is most of the work, and so it is that
function which must be fast: `evkernels.nn.EventSpikeTensor` says how its network is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evkernels.nn.functional import columns
from evkernels.ops import checks
from evkernels.reference.event_histogram import window_of_event

if TYPE_CHECKING:
    from evkernels.nn.event_input import EventInput


def event_spike_tensor(
    x: EventInput,
    y: Tensor | None = None,
    t: Tensor | None = None,
    p: Tensor | None = None,
    *,
    share: Callable[[Tensor], Tensor],
    bins: int,
    height: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    offsets: Tensor | None = None,
) -> Tensor:
    """EST: every event adds its time, weighted by a function of the distance in time, to every bin of its pixel.

    Equivalent to::

        time = ((t - t.min()).double() / (t.max() - t.min()).clamp(min=1)).to(dtype)
        distance = time[:, None] - torch.arange(bins, dtype=dtype) / (bins - 1)
        cell = (p * bins * height + y) * width + x
        cell = cell[:, None] + torch.arange(bins) * height * width
        grid = torch.zeros(2 * bins * height * width, dtype=dtype)
        grid = grid.index_add(0, cell.flatten(), (time[:, None] * share(distance)).flatten())
        grid = grid.view(2 * bins, height, width)

    Args:
        x: Columns [E], any integer dtype, 0 <= x < width; or, in the place of x, y, t, p and offsets,
            `evkernels.events.Events`, `EventBatch` or a structured NumPy array with fields x, y, t, p.
        y: Rows [E], any integer dtype, 0 <= y < height.
        t: Timestamps [E], int64 or int32, in any unit and order.
        p: Polarities [E], bool or any integer dtype: 1 is ON, 0 and -1 are OFF, other values are out of range.
        share: From distances [E, bins], `dtype` in [-1, 1], to what an event's time counts in each bin, of the same
            shape and dtype. EST's triangle is `lambda distance: (1 - (bins - 1) * distance.abs()).clamp(min=0)`, its
            network `evkernels.nn.EventSpikeTensor(...).value_layer.share`.
        bins: Number of time bins, at least 2. Bin b lies at the share b / (bins - 1) of a window's time.
        height: Rows of the sensor.
        width: Columns of the sensor.
        dtype: Of times, distances and result: float32, float64, or a 16-bit floating dtype.
        offsets: Cuts a batch of windows out of the events, int64 [B + 1], see `evkernels.ops.voxel_grid`.

    Returns:
        `dtype` [2 * bins, height, width], or [B, 2 * bins, height, width] with `offsets` or EventBatch: the bins of OFF
        events first.

    Raises:
        TypeError: if an argument is of another type or dtype, or columns are missing.
        ValueError: if shapes or devices disagree, or a number is out of its bounds.

    Times count from the window's first event; the published layer divides times as they are by the largest, which is
    the same for recordings that begin at 0. Events out of range are dropped, though they count for the first and last
    time. Deterministic on the CPU; on a GPU the order of additions may change the last bit. Differentiable with respect
    to what `share` computes with.
    Source: Gehrig et al. 2019 (arXiv:1904.08245), eq. 5 and section 3.3.
    """
    checks.check_int("bins", bins, 2, 2**24)
    if dtype not in checks.FLOATING:
        raise TypeError(f"dtype must be {' or '.join(str(known) for known in checks.FLOATING)}, got {dtype}")
    x, y, t, p, offsets = columns.checked(x, y, t, p, offsets, height, width)
    x, y, t, p = (column.to(torch.int64) for column in (x, y, t, p))
    windows = columns.number_of_windows(offsets)
    window = window_of_event(t, offsets)
    first, last = columns.first_and_last(t, offsets)
    span = (last - first).clamp(min=1)
    # Subtracted as integers: float32 cannot tell two microseconds of the same year apart.
    time = ((t - first[window]).double() / span[window].double()).to(dtype)
    places = torch.arange(bins, device=t.device, dtype=dtype) / (bins - 1)
    distance = time[:, None] - places
    shares = share(distance)
    if shares.shape != distance.shape or shares.dtype != dtype:
        came = f"{tuple(shares.shape)} in {shares.dtype}"
        raise ValueError(f"share must return [E, bins] = {tuple(distance.shape)} in {dtype}, got {came}")
    value = time[:, None] * shares

    plane = height * width
    cell = (2 * window + (p > 0)) * bins * plane + y * width + x
    cell = cell[:, None] + torch.arange(bins, device=t.device) * plane
    cells = windows * 2 * bins * plane
    # Dropped events go into one cell too many.
    cell = torch.where(columns.contains(x, y, p, height, width)[:, None], cell, cells)
    grid = value.new_zeros(cells + 1).index_add(0, cell.flatten(), value.flatten())[:cells]
    shape = (2 * bins, height, width)
    return grid.view(shape if offsets is None else (windows, *shape))
