"""Representations that remember more than the last event of a pixel: averaged time surfaces (HATS) and TORE volumes.

Neither has a kernel of its own. TORE is the fused surface of last events, asked again for what lies below each last
event. Averaged surfaces are sums over pairs of events; an event takes those with all events of a neighbouring pixel at
once, from a sum along that pixel's own events. Made pair by pair, 200,000 events of 128x128 pixels take twice as long,
and the first 100,000 of a spinner, some of whose pixels have hundreds, 9 times as long: the more, the longer. Windows
of 2,000 took a quarter of the time that way.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from evkernels import ops
from evkernels.nn.functional import columns
from evkernels.ops import event_columns
from evkernels.reference.event_histogram import window_of_event

if TYPE_CHECKING:
    from evkernels.nn.event_input import EventInput


def time_ordered_recent_events(
    x: EventInput,
    y: Tensor | None = None,
    t: Tensor | None = None,
    p: Tensor | None = None,
    *,
    height: int,
    width: int,
    events: int = 4,
    min_time: float = 150.0,
    max_time: float = 5e6,
    at: int | Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """TORE volume: at every pixel the logarithms of the ages of the latest events of each polarity.

    Equivalent to::

        ages, at = torch.full((2, height, width, events), max_time), t.max() if at is None else at
        for k in t.argsort(stable=True):
            memory = ages[1 - p[k], y[k], x[k]]
            memory[:] = torch.cat([(at - t[k])[None].float(), memory[:-1]])
        volume = torch.log1p(ages.clamp(0, max_time)) - math.log1p(min_time)
        volume = volume.clamp(min=0).permute(0, 3, 1, 2).flatten(0, 1)

    Args:
        x: Columns [E], any integer dtype, 0 <= x < width; or, in the place of x, y, t, p and offsets,
            `evkernels.events.Events`, `EventBatch` or a structured NumPy array with fields x, y, t, p.
        y: Rows [E], any integer dtype, 0 <= y < height.
        t: Timestamps [E], int64 or int32, in any unit and order.
        p: Polarities [E], bool or any integer dtype: 1 is ON, 0 and -1 are OFF, other values are out of range.
        height: Rows of the sensor.
        width: Columns of the sensor.
        events: How many of the latest events are kept per pixel and polarity.
        min_time: Ages up to this, in the unit of the timestamps, count as 0.
        max_time: Ages beyond this, and of events that never came, count as this.
        at: Time from which ages count, an int or int64 [B]; None: each window's latest time, events out of range
            included. Events after it have age 0.
        offsets: Cuts a batch of windows out of the events, int64 [B + 1], see `evkernels.ops.time_surface`.

    Returns:
        float32 [2 * events, height, width], or [B, 2 * events, height, width] with `offsets` or EventBatch: ON before
        OFF, the youngest event first.

    Raises:
        TypeError: if an argument is of another type or dtype, or columns are missing.
        ValueError: if shapes or devices disagree, or a number is out of its bounds.

    Events out of range are dropped. Deterministic: of events of a pixel at the same time the later in the arrays is the
    younger. Not differentiable.
    Source: Baldwin et al. 2023 (arXiv:2103.06108), eq. 4; its implementations differ in `max_time`.
    """
    check_tore(events, min_time, max_time)
    x, y, t, p, offsets = columns.checked(x, y, t, p, offsets, height, width)
    t = t.to(torch.int64)
    window = window_of_event(t, offsets)
    order = _by_time(t, window)
    x, y, t, p = (column[order] for column in (_indexable(x), _indexable(y), t, p))
    latest = columns.first_and_last(t, offsets)[1]
    at = latest if at is None else event_columns.one_per_window("at", at, latest.shape[0], x)
    number = torch.arange(t.shape[0], device=t.device)
    # One event too many, which stands for those that never came; 2 is no polarity, so the ops drop such events.
    t, p = nn.functional.pad(t, (0, 1)), nn.functional.pad(p.to(torch.int8), (0, 1))
    ages = []
    for _ in range(events):
        last = ops.time_surface(x, y, number, p[:-1], height=height, width=width, offsets=offsets)
        event = torch.where(last < 0, number.shape[0], last)
        age = at.view(-1, 1, 1, 1) - t[event].view(-1, 2, height, width)
        ages.append(torch.where(last.view(age.shape) < 0, max_time, age.clamp(min=0).float()))
        p = p.index_fill(0, event.flatten(), 2)
    age = torch.stack(ages, dim=2).flip(1).clamp(max=max_time)
    volume = (torch.log1p(age) - math.log1p(min_time)).clamp(min=0).flatten(1, 2)
    return volume[0] if offsets is None else volume


def check_tore(events: int, min_time: float, max_time: float) -> None:
    """Raises if no volume can be made of so many events and these times."""
    if events < 1 or not 0 <= min_time < max_time:
        given = f"{events}, {min_time} and {max_time}"
        raise ValueError(f"events must be at least 1 and 0 <= min_time < max_time, got {given}")


def averaged_time_surface(
    x: EventInput,
    y: Tensor | None = None,
    t: Tensor | None = None,
    p: Tensor | None = None,
    *,
    height: int,
    width: int,
    cell_size: int = 10,
    surface_size: int = 7,
    time_window: int = 100_000,
    tau: float = 1e6,
    offsets: Tensor | None = None,
) -> Tensor:
    """HATS: for each square cell of pixels the average, over its events, of what came around them before.

    Equivalent to::

        x, y, t, p = (column[t.argsort(stable=True)] for column in (x, y, t, p))
        rows, columns, reach = -(-height // cell_size), -(-width // cell_size), surface_size // 2
        group = ((y // cell_size) * columns + x // cell_size) * 2 + p
        age, dy, dx = (t[:, None] - t, y - y[:, None] + reach, x - x[:, None] + reach)
        is_seen = torch.ones_like(age, dtype=torch.bool).tril(-1) & (age <= time_window) & (group[:, None] == group)
        is_seen &= (dy.clamp(0, surface_size - 1) == dy) & (dx.clamp(0, surface_size - 1) == dx)
        i, j = (is_seen | torch.eye(len(t), dtype=torch.bool)).nonzero().T
        sums = torch.zeros(rows * columns * 2, surface_size, surface_size, dtype=torch.float64)
        sums.index_put_((group[i], dy[i, j], dx[i, j]), torch.exp(-age[i, j] / tau).double(), accumulate=True)
        counts = torch.bincount(group, minlength=len(sums)).clamp(min=1)[:, None, None]
        surfaces = (sums / counts).float().view(rows * columns, 2, surface_size, surface_size)

    Args:
        x, y, t, p, height, width, offsets: As for `time_ordered_recent_events`.
        cell_size: Rows and columns of pixels in a cell; the last ones may hold fewer.
        surface_size: Rows and columns of the surface around an event, odd and at most `cell_size`.
        time_window: How far back events are looked for, an integer in the unit of the timestamps, ends included.
        tau: Time constant of the decay exp(-age / tau).

    Returns:
        float32 [cells, 2, surface_size, surface_size], or [B, cells, 2, surface_size, surface_size] with `offsets` or
        EventBatch: cells row by row, OFF before ON. Zeros where no event came.

    Raises:
        TypeError: if an argument is of another type or dtype, or columns are missing.
        ValueError: if shapes or devices disagree, a number is out of its bounds, or windows times duration reach 2**63.

    Only events of the same cell and polarity are seen; each event adds 1 in the middle of its own surface. Events out
    of range are dropped. The work grows with the events times the pixels of a surface, not with the events that each
    one sees. Sums are made in float64. Deterministic on the CPU; on a GPU the order of additions may change the last
    bit. Not differentiable.
    Source: Sironi et al. 2018 (arXiv:1803.07913), eq. 4 to 6; tonic's `to_averaged_timesurface`, whose float32 times
    this does not share.
    """
    check_hats(cell_size, surface_size, time_window, tau)
    x, y, t, p, offsets = columns.checked(x, y, t, p, offsets, height, width)
    windows, size = columns.number_of_windows(offsets), surface_size
    x, y, t, p = (column.to(torch.int64) for column in (x, y, t, p))
    window = window_of_event(t, offsets)
    order = _by_time(t, window)
    order = order[columns.contains(x, y, p, height, width)[order]]
    x, y, t, p, window = (column[order] for column in (x, y, t, p, window))
    rows, columns_of_cells = grid_of_cells(height, width, cell_size)
    group = ((window * rows + y // cell_size) * columns_of_cells + x // cell_size) * 2 + (p > 0)
    groups = windows * rows * columns_of_cells * 2
    counts = torch.bincount(group, minlength=groups)
    sums = torch.zeros(groups, size, size, dtype=torch.float64, device=t.device)
    if t.shape[0]:
        earliest = _earliest(t, window, windows, time_window)
        _add_pairs(sums, group, x % cell_size, y % cell_size, t, earliest, cell_size, tau)
    sums[:, size // 2, size // 2] += counts
    surfaces = (sums / counts.clamp(min=1)[:, None, None]).float()
    shape = (rows * columns_of_cells, 2, size, size)
    return surfaces.view(shape if offsets is None else (windows, *shape))


def check_hats(cell_size: int, surface_size: int, time_window: int, tau: float) -> None:
    """Raises if no surfaces can be made with these sizes and times."""
    if surface_size % 2 == 0 or not 1 <= surface_size <= cell_size:
        raise ValueError(f"surface_size must be odd and at most cell_size = {cell_size}, got {surface_size}")
    if time_window < 0 or tau <= 0:
        raise ValueError(f"time_window must be at least 0 and tau positive, got {time_window} and {tau}")


def grid_of_cells(height: int, width: int, cell_size: int) -> tuple[int, int]:
    """Rows and columns of cells; the last ones may hold fewer pixels."""
    return -(-height // cell_size), -(-width // cell_size)


def _earliest(t: Tensor, window: Tensor, windows: int, time_window: int) -> Tensor:
    """For each event, ordered by window and time, the number of the first one that it still sees, int64 [E]."""
    since = t - t.min()
    # So far apart that looking back never ends in the window before.
    step = int(since.max()) + time_window + 1
    if windows * step >= 2**63:
        raise ValueError(f"windows times duration must be below 2**63, got {windows} and {step}")
    key = window * step + since
    return torch.searchsorted(key, key - time_window)


def _add_pairs(
    sums: Tensor, group: Tensor, x: Tensor, y: Tensor, t: Tensor, earliest: Tensor, cell: int, tau: float
) -> None:
    """Adds the decayed events around each event; x and y count from its cell's corner."""
    events, reach = t.shape[0], sums.shape[-1] // 2
    pixel = (group * cell + y) * cell + x
    by_pixel = pixel.argsort(stable=True)
    group, x, y, t, pixel, earliest = (column[by_pixel] for column in (group, x, y, t, pixel, earliest))
    # Sorted, as by_pixel are the events' numbers in time.
    key = pixel * events + by_pixel
    left = _left_behind(t, pixel, tau)

    def left_of_earlier(number: Tensor, own: Tensor, source: Tensor) -> Tensor:
        """What is left, at the events `own`, of the events of pixels `source` with smaller numbers."""
        last = (torch.searchsorted(key, source * events + number) - 1).clamp(min=0)
        age = (t[own] - t[last]).double()
        is_any = (pixel[last] == source) & (by_pixel[last] < number)
        return torch.where(is_any, left[last] * torch.exp(-age.clamp(min=0) / tau), 0.0)

    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            is_inside = (x + dx >= 0) & (x + dx < cell) & (y + dy >= 0) & (y + dy < cell)
            own = is_inside.nonzero()[:, 0]
            source = pixel[own] + dy * cell + dx
            before = left_of_earlier(by_pixel[own], own, source)
            too_old = left_of_earlier(earliest[own], own, source)
            sums[:, dy + reach, dx + reach].index_add_(0, group[own], before - too_old)


def _left_behind(t: Tensor, pixel: Tensor, tau: float) -> Tensor:
    """At each event what is left of it and of all events of its pixel before it, float64 [E].

    Events are ordered by pixel and then by time. That is a recurrence along each pixel's events, made by doubling: no
    factor exceeds 1, so neither long recordings nor short time constants overflow.
    """
    is_first = torch.ones_like(pixel, dtype=torch.bool)
    is_first[1:] = pixel[1:] != pixel[:-1]
    factor = nn.functional.pad(torch.exp(-(t[1:] - t[:-1]).double() / tau), (1, 0))
    factor.masked_fill_(is_first, 0)
    left = torch.ones_like(factor)
    step = 1
    while step < t.shape[0] and bool(factor.any()):
        left[step:] += factor[step:] * left[:-step].clone()
        factor[step:] *= factor[:-step].clone()
        factor[:step] = 0
        step *= 2
    return left


def _indexable(column: Tensor) -> Tensor:
    """PyTorch indexes no wide unsigned integers."""
    return column.to(torch.int64) if column.dtype in (torch.uint16, torch.uint32, torch.uint64) else column


def _by_time(t: Tensor, window: Tensor) -> Tensor:
    """Order of the events by window and then by time; events of equal time keep theirs."""
    order = t.argsort(stable=True)
    return order[window[order].argsort(stable=True)]
