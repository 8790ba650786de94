"""What the representations that are no op of their own share: how they are called, which events are inside."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from evkernels.nn import event_input

if TYPE_CHECKING:
    from evkernels.nn.event_input import EventInput


class EventRepresentation(nn.Module):
    """A module from events in any form to a dense tensor; what that holds is the subclass's to say.

    Args:
        height: Rows of the sensor.
        width: Columns of the sensor.
    """

    # Attributes that the module's text shows.
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
        return self.represent(*event_input.columns(x, y, pol, time, offsets))

    def represent(self, x: Tensor, y: Tensor, t: Tensor, p: Tensor, offsets: Tensor | None) -> Tensor:
        """`forward` on columns."""
        raise NotImplementedError

    def contains(self, x: Tensor, y: Tensor, p: Tensor) -> Tensor:
        """Which events are within the sensor and have a polarity, bool [E]."""
        return (x >= 0) & (x < self.width) & (y >= 0) & (y < self.height) & (p >= -1) & (p <= 1)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)}" for name in self.shown)
