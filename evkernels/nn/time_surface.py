"""Time surfaces as a module: at every pixel the last event's time, or what a decay has left of the event."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from evkernels import ops
from evkernels.nn import event_input

if TYPE_CHECKING:
    from evkernels.nn.event_input import EventInput


class TimeSurface(nn.Module):
    """Time of the last event of each polarity at every pixel, or what is left of it after a decay.

    Args:
        height: Rows of the surface, which are the sensor's unless there is a `pixel_map`.
        width: Columns of the surface, likewise.
        tau: Time constant of the decay in the unit of the timestamps; None gives the last times themselves.
        polarities: 2 gives OFF and ON events a surface each, in this order; 1 takes them together.
        decay: "exponential" leaves exp(-age / tau) of an event, "linear" max(0, 1 - age / tau).
        pixel_map: Where the sensor's pixels lie in the image, int32 [H, W] as of `evkernels.events.pixel_map`: flip,
            crop, downsampling, rectification and removal of pixels in the same pass. None: the sensor is the image.

    No parameters, no gradients. See `evkernels.ops.time_surface`. With `tau`, 2 polarities and `at` the end of each
    slice these are the surfaces of tonic's `ToTimesurface`, if `step` carries the last times from slice to slice.
    """

    def __init__(
        self,
        height: int,
        width: int,
        tau: float | None = None,
        polarities: Literal[1, 2] = 2,
        decay: Literal["exponential", "linear"] = "exponential",
        pixel_map: Tensor | None = None,
    ):
        super().__init__()
        self.height = height
        self.width = width
        self.tau = tau
        self.polarities = polarities
        self.decay = decay
        self.register_buffer("pixel_map", pixel_map, persistent=False)

    def forward(
        self,
        x: EventInput,
        y: Tensor | None = None,
        pol: Tensor | None = None,
        time: Tensor | None = None,
        surface: Tensor | None = None,
        offsets: Tensor | None = None,
        at: int | Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The surface of one window, or of each window of a batch.

        Args:
            x: Columns [E], any integer dtype; or, instead of the four columns and `offsets`, `evkernels.events.Events`,
                `EventBatch` or a structured NumPy array with fields x, y, t, p.
            y: Rows [E], any integer dtype.
            pol: Polarities [E]: 1 is ON, 0 and -1 are OFF.
            time: Timestamps [E], int64 or int32, in any order.
            surface: Last times to go on from, int64, as `step` returns them; never written to.
            offsets: Cuts a batch of windows out of the events, int64 [B + 1].
            at: Time to which events decay, an int or int64 [B]; None means the latest time. Only with `tau`.
            out: Takes the result, which is then `out` itself; see `evkernels.ops.time_surface`.

        Returns:
            [polarities, height, width], or [B, polarities, height, width] with `offsets` or EventBatch: float32 in 0 to
            1 with `tau`, else int64 with -2**63 where no event came.
        """
        *columns, offsets = event_input.columns(x, y, pol, time, offsets)
        return self._call(*columns, surface, offsets, tau=self.tau, at=at, out=out)

    def step(
        self,
        x: EventInput,
        y: Tensor | None = None,
        pol: Tensor | None = None,
        time: Tensor | None = None,
        surface: Tensor | None = None,
        offsets: Tensor | None = None,
        at: int | Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """What `forward` returns, and the last times to hand in with the next events of the stream.

        Args:
            x, y, pol, time, surface, offsets, at: As for `forward`, but events out of range are no latest time.

        Returns:
            The surface, and the last times int64 of the same shape. Without `tau` they are one tensor.
        """
        *columns, offsets = event_input.columns(x, y, pol, time, offsets)
        last = self._call(*columns, surface, offsets)
        if self.tau is None:
            return last, last
        none = [column[:0] for column in columns]
        return self._call(*none, last, None if offsets is None else offsets * 0, tau=self.tau, at=at), last

    def _call(self, x, y, t, p, surface, offsets, **decay):
        return ops.time_surface(
            x,
            y,
            t,
            p,
            height=self.height,
            width=self.width,
            polarities=self.polarities,
            decay=self.decay,
            surface=surface,
            offsets=offsets,
            pixel_map=self.pixel_map,
            **decay,
        )

    def extra_repr(self) -> str:
        names = ("height", "width", "tau", "polarities", "decay")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
