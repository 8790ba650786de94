"""Memories of more than the last event as modules over `evkernels.nn.functional`: TORE volumes, averaged surfaces."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from evkernels.nn import functional
from evkernels.nn.event_representation import EventRepresentation
from evkernels.nn.functional.event_memories import check_hats, check_tore, grid_of_cells

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

    No parameters, no gradients. See `evkernels.nn.functional.time_ordered_recent_events`.
    """

    function = staticmethod(functional.time_ordered_recent_events)
    shown = ("height", "width", "events", "min_time", "max_time")

    def __init__(self, height: int, width: int, events: int = 4, min_time: float = 150.0, max_time: float = 5e6):
        super().__init__(height, width)
        check_tore(events, min_time, max_time)
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
        return self.function(x, y, time, pol, offsets=offsets, at=at, **self.arguments())


class AveragedTimeSurface(EventRepresentation):
    """HATS: for each square cell of pixels the average, over its events, of what came around them before.

    Args:
        height: Rows of the sensor.
        width: Columns of the sensor.
        cell_size: Rows and columns of pixels in a cell.
        surface_size: Rows and columns of the surface around an event, odd and at most `cell_size`.
        time_window: How far back events are looked for, an integer in the unit of the timestamps, ends included.
        tau: Time constant of the decay exp(-age / tau).

    No parameters, no gradients. See `evkernels.nn.functional.averaged_time_surface`.

    Returns:
        float32 [cells, 2, surface_size, surface_size], or [B, cells, 2, surface_size, surface_size] with `offsets`
        or EventBatch: cells row by row, OFF before ON. Zeros where no event came.
    """

    function = staticmethod(functional.averaged_time_surface)
    shown = ("height", "width", "cell_size", "surface_size", "time_window", "tau")

    def __init__(
        self, height: int, width: int, cell_size: int = 10, surface_size: int = 7, time_window: int = 100_000,
        tau: float = 1e6,
    ):  # fmt: skip
        super().__init__(height, width)
        check_hats(cell_size, surface_size, time_window, tau)
        self.cell_size = cell_size
        self.surface_size = surface_size
        self.time_window = time_window
        self.tau = tau

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of cells; the last ones may hold fewer pixels."""
        return grid_of_cells(self.height, self.width, self.cell_size)
