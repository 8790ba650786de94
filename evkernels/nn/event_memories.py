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
from evkernels.nn import event_input
from evkernels.nn.event_representation import EventRepresentation
from evkernels.reference.event_histogram import window_of_event, window_times

if TYPE_CHECKING:
    from evkernels.nn.event_input import EventInput


class TimeOrderedRecentEvents(EventRepresentation):
    """TORE volume: at every pixel the logarithms of the ages of the latest events of each polarity.

    Args:
        height: Rows of the sensor.
        width: Columns of the sensor.
        events: How many of the latest events are kept per pixel and polarity.
        min_time: Ages up to this, in the unit of the timestamps, count as 0.
        max_time: Ages beyond this, and of events that never came, count as this.

    An age a becomes max(0, log(min(a, max_time) + 1) - log(min_time + 1)). Events out of range are dropped, times need
    not be sorted; of events of a pixel at the same time the later in the arrays is the younger. No parameters, no
    gradients. Source: Baldwin et al. 2023 (arXiv:2103.06108), eq. 4; its implementations differ in `max_time`.
    """

    shown = ("height", "width", "events", "min_time", "max_time")

    def __init__(self, height: int, width: int, events: int = 4, min_time: float = 150.0, max_time: float = 5e6):
        super().__init__(height, width)
        if events < 1 or not 0 <= min_time < max_time:
            given = f"{events}, {min_time} and {max_time}"
            raise ValueError(f"events must be at least 1 and 0 <= min_time < max_time, got {given}")
        self.events = events
        self.min_time = min_time
        self.max_time = max_time

    def forward(
        self,
        x: EventInput,
        y: Tensor | None = None,
        pol: Tensor | None = None,
        time: Tensor | None = None,
        offsets: Tensor | None = None,
        at: int | Tensor | None = None,
    ) -> Tensor:
        """The volume of one window, or of each window of a batch.

        Args:
            x, y, pol, time, offsets: As for `EventImage.forward`.
            at: Time from which ages count, an int or int64 [B]; None: each window's latest time, events out of range
                included. Events after it have age 0.

        Returns:
            float32 [2 * events, height, width], or [B, 2 * events, height, width] with `offsets` or EventBatch: ON
            before OFF, the youngest event first.
        """
        x, y, t, p, offsets = event_input.columns(x, y, pol, time, offsets)
        t = t.to(torch.int64)
        window = window_of_event(t, offsets)
        order = _by_time(t, window)
        x, y, t, p = (column[order] for column in (_indexable(x), _indexable(y), t, p))
        latest = window_times(t, window, 1 if offsets is None else offsets.shape[0] - 1)[1]
        at = latest if at is None else torch.as_tensor(at, device=t.device)
        number = torch.arange(t.shape[0], device=t.device)
        # One event too many, which stands for those that never came; 2 is no polarity, so the ops drop such events.
        t, p = nn.functional.pad(t, (0, 1)), nn.functional.pad(p.to(torch.int8), (0, 1))
        ages = []
        for _ in range(self.events):
            last = ops.time_surface(x, y, number, p[:-1], height=self.height, width=self.width, offsets=offsets)
            event = torch.where(last < 0, number.shape[0], last)
            age = at.view(-1, 1, 1, 1) - t[event].view(-1, 2, self.height, self.width)
            ages.append(torch.where(last.view(age.shape) < 0, self.max_time, age.clamp(min=0).float()))
            p = p.index_fill(0, event.flatten(), 2)
        age = torch.stack(ages, dim=2).flip(1).clamp(max=self.max_time)
        volume = (torch.log1p(age) - math.log1p(self.min_time)).clamp(min=0).flatten(1, 2)
        return volume[0] if offsets is None else volume


class AveragedTimeSurface(EventRepresentation):
    """HATS: for each square cell of pixels the average, over its events, of what came around them before.

    Args:
        height: Rows of the sensor.
        width: Columns of the sensor.
        cell_size: Rows and columns of pixels in a cell.
        surface_size: Rows and columns of the surface around an event, odd.
        time_window: How far back events are looked for, an integer in the unit of the timestamps, ends included.
        tau: Time constant of the decay exp(-age / tau).

    Only events of the same cell and polarity are seen; each event adds 1 in the middle of its own surface. Events out
    of range are dropped, times need not be sorted. The work grows with the events times the pixels of a surface, not
    with the events that each one sees. Sums are made in float64. No parameters, no gradients. Source: Sironi et al.
    2018 (arXiv:1803.07913), eq. 4 to 6; tonic's `to_averaged_timesurface`, whose float32 times this does not share.

    Returns:
        float32 [cells, 2, surface_size, surface_size], or [B, cells, 2, surface_size, surface_size] with `offsets`
        or EventBatch: cells row by row, OFF before ON. Zeros where no event came.

    Raises:
        ValueError: if windows times duration reach 2**63.
    """

    shown = ("height", "width", "cell_size", "surface_size", "time_window", "tau")

    def __init__(
        self, height: int, width: int, cell_size: int = 10, surface_size: int = 7, time_window: int = 100_000,
        tau: float = 1e6,
    ):  # fmt: skip
        super().__init__(height, width)
        if surface_size % 2 == 0 or not 1 <= surface_size <= cell_size:
            raise ValueError(f"surface_size must be odd and at most cell_size = {cell_size}, got {surface_size}")
        if time_window < 0 or tau <= 0:
            raise ValueError(f"time_window must be at least 0 and tau positive, got {time_window} and {tau}")
        self.cell_size = cell_size
        self.surface_size = surface_size
        self.time_window = time_window
        self.tau = tau

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of cells; the last ones may hold fewer pixels."""
        return -(-self.height // self.cell_size), -(-self.width // self.cell_size)

    def represent(self, x: Tensor, y: Tensor, t: Tensor, p: Tensor, offsets: Tensor | None) -> Tensor:
        windows = 1 if offsets is None else offsets.shape[0] - 1
        x, y, t, p = (column.to(torch.int64) for column in (x, y, t, p))
        window = window_of_event(t, offsets)
        order = _by_time(t, window)
        order = order[self.contains(x, y, p)[order]]
        x, y, t, p, window = (column[order] for column in (x, y, t, p, window))
        rows, columns = self.grid
        group = ((window * rows + y // self.cell_size) * columns + x // self.cell_size) * 2 + (p > 0)
        groups, size = windows * rows * columns * 2, self.surface_size
        counts = torch.bincount(group, minlength=groups)
        sums = torch.zeros(groups, size, size, dtype=torch.float64, device=t.device)
        if t.shape[0]:
            self._add_pairs(sums, group, x % self.cell_size, y % self.cell_size, t, self._earliest(t, window, windows))
        sums[:, size // 2, size // 2] += counts
        surfaces = (sums / counts.clamp(min=1)[:, None, None]).float()
        shape = (rows * columns, 2, size, size)
        return surfaces.view(shape if offsets is None else (windows, *shape))

    def _earliest(self, t: Tensor, window: Tensor, windows: int) -> Tensor:
        """For each event, ordered by window and time, the number of the first one that it still sees, int64 [E]."""
        since = t - t.min()
        # So far apart that looking back never ends in the window before.
        step = int(since.max()) + self.time_window + 1
        if windows * step >= 2**63:
            raise ValueError(f"windows times duration must be below 2**63, got {windows} and {step}")
        key = window * step + since
        return torch.searchsorted(key, key - self.time_window)

    def _add_pairs(self, sums: Tensor, group: Tensor, x: Tensor, y: Tensor, t: Tensor, earliest: Tensor) -> None:
        """Adds the decayed events around each event; x and y count from its cell's corner."""
        cell, events, reach = self.cell_size, t.shape[0], self.surface_size // 2
        pixel = (group * cell + y) * cell + x
        by_pixel = pixel.argsort(stable=True)
        group, x, y, t, pixel, earliest = (column[by_pixel] for column in (group, x, y, t, pixel, earliest))
        # Sorted, as by_pixel are the events' numbers in time.
        key = pixel * events + by_pixel
        left = _left_behind(t, pixel, self.tau)

        def left_of_earlier(number: Tensor, own: Tensor, source: Tensor) -> Tensor:
            """What is left, at the events `own`, of the events of pixels `source` with smaller numbers."""
            last = (torch.searchsorted(key, source * events + number) - 1).clamp(min=0)
            age = (t[own] - t[last]).double()
            is_any = (pixel[last] == source) & (by_pixel[last] < number)
            return torch.where(is_any, left[last] * torch.exp(-age.clamp(min=0) / self.tau), 0.0)

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
