"""What the representations that are no op of their own share: a function, its arguments, and how they are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from evkernels.nn.event_input import EventInput


class EventRepresentation(nn.Module):
    """A function of `evkernels.nn.functional` with its arguments.

    Args:
        height: Rows of the sensor.
        width: Columns of the sensor.
    """

    # From events to a dense tensor; the subclass's, as a staticmethod.
    function: Callable[..., Tensor]
    # Attributes that the module's text shows; by these names the function takes them.
    shown: tuple[str, ...] = ("height", "width")

    def __init__(self, height: int, width: int):
        super().__init__()
        self.height = height
        self.width = width

    def forward(
        self,
        x: EventInput,
        y: Tensor | None = None,
        pol: Tensor | None = None,
        time: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> Tensor:
        """The representation of one window, or of each window of a batch.

        Args:
            x: Columns [E], any integer dtype; or, with nothing else, `evkernels.events.Events`, `EventBatch` or a
                structured NumPy array with fields x, y, t, p.
            y: Rows [E], any integer dtype.
            pol: Polarities [E]: 1 is ON, 0 and -1 are OFF.
            time: Timestamps [E], int64 or int32, in any order.
            offsets: Cuts a batch of windows out of the events, int64 [B + 1].

        Returns:
            What the class describes, with a first dimension B where `offsets` or EventBatch say that there is a batch.
        """
        return self.function(x, y, time, pol, offsets=offsets, **self.arguments())

    def arguments(self) -> dict[str, Any]:
        """The function's arguments beside the events."""
        return {name: getattr(self, name) for name in self.shown}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.shown)
