"""Images of events made of the fused ops: event image, event-count image, Bina-Rep, RVT's mixed-density stack.

None of them has a kernel of its own: counting and finding the last event are the work, and the ops do it; what remains
are a few passes over an image. `MixedDensityEventStack` alone counts in plain PyTorch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from evkernels import ops
from evkernels.nn.event_representation import EventRepresentation
from evkernels.reference.event_histogram import window_of_event, window_times
from evkernels.reference.time_surface import NEVER

Colour = tuple[int, int, int]


class EventImage(EventRepresentation):
    """Colour image in which the last event of a pixel wins; EventGPT's picture of an event window.

    Args:
        height: Rows of the sensor.
        width: Columns of the sensor.
        on: Red, green and blue of ON events, 0 to 255 each.
        off: The same of OFF events.
        background: The same of pixels without events.

    Of two events of a pixel at the same time the ON event wins, whatever their order; EventGPT takes the later one in
    its arrays, and cuts the image to the largest coordinates. Events out of range are dropped, times need not be
    sorted. No parameters, no gradients.

    Returns:
        uint8 [height, width, 3], or [B, height, width, 3] with `offsets` or EventBatch.
    """

    def __init__(
        self,
        height: int,
        width: int,
        on: Colour = (255, 0, 0),
        off: Colour = (0, 0, 255),
        background: Colour = (255, 255, 255),
    ):
        super().__init__(height, width)
        self.register_buffer("palette", torch.tensor([background, off, on], dtype=torch.uint8), persistent=False)

    def represent(self, x: Tensor, y: Tensor, t: Tensor, p: Tensor, offsets: Tensor | None) -> Tensor:
        last = ops.time_surface(x, y, t, p, height=self.height, width=self.width, offsets=offsets)
        off, on = last.unbind(-3)
        # In bytes as long as possible, and not by indexing: 1 ms instead of 5 at 640x480.
        colour = ((on >= off).to(torch.uint8) + 1) * (torch.maximum(on, off) > NEVER)
        return nn.functional.embedding(colour.int(), self.palette)

    def extra_repr(self) -> str:
        background, off, on = (tuple(colour) for colour in self.palette.tolist())
        return f"height={self.height}, width={self.width}, on={on}, off={off}, background={background}"


class EventCountImage(EventRepresentation):
    """Counts and last times of both polarities: EV-FlowNet's four channels.

    Args:
        height: Rows of the sensor.
        width: Columns of the sensor.

    Events out of range are dropped, times need not be sorted. No parameters, no gradients. The paper's convention:
    Zhu et al. 2018 (arXiv:1802.06898), section III-A.

    Returns:
        float32 [4, height, width], or [B, 4, height, width] with `offsets`: number of ON and of OFF events, up to
        2**24, time of the last ON and of the last OFF event, 0 for the first event of the window to 1 for the
        last, those out of range included. Zeros where no event came.
    """

    def represent(self, x: Tensor, y: Tensor, t: Tensor, p: Tensor, offsets: Tensor | None) -> Tensor:
        arguments = {"height": self.height, "width": self.width, "offsets": offsets}
        counts = ops.event_histogram(x, y, t, p, bins=1, dtype=torch.float32, **arguments)
        last = ops.time_surface(x, y, t, p, **arguments)
        first, final = (time.view(-1, 1, 1, 1) for time in _window_times(t, offsets))
        # Subtracted as integers: float32 cannot tell two microseconds of the same year apart.
        since = ((last - first).float() / (final - first).clamp(min=1).float()).view(last.shape)
        times = torch.where(last == NEVER, 0.0, since)
        return torch.cat([counts.flip(-3), times.flip(-3)], dim=-3)


class BinaRep(EventRepresentation):
    """Bina-Rep: `bits` binary frames of consecutive times read as one number, the first as its most significant bit.

    Args:
        bits: Binary frames per number, 1 to 24. With 1 the result is the binary frame itself.
        height: Rows of the sensor.
        width: Columns of the sensor.
        frames: Results per window, one after the other in time.

    Events out of range are dropped, times need not be sorted. No parameters, no gradients. Source: Barchid et al. 2022
    (arXiv:2203.09991); the time bins are those of `evkernels.ops.event_histogram`.

    Returns:
        float32 [frames, 2, height, width] in 0 to 1, OFF before ON, or [B, frames, 2, height, width] with
        `offsets`.
    """

    shown = ("bits", "height", "width", "frames")

    def __init__(self, bits: int, height: int, width: int, frames: int = 1):
        super().__init__(height, width)
        if not 1 <= bits <= 24:
            raise ValueError(f"bits must be in [1, 24], got {bits}")
        self.bits = bits
        self.frames = frames

    def represent(self, x: Tensor, y: Tensor, t: Tensor, p: Tensor, offsets: Tensor | None) -> Tensor:
        bins = self.frames * self.bits
        binary = ops.event_histogram(
            x, y, t, p, bins=bins, height=self.height, width=self.width, count_cutoff=1, offsets=offsets
        )
        planes = binary.unflatten(-3, (2, self.frames, self.bits)).unbind(-3)
        number = planes[0].to(torch.uint8 if self.bits <= 8 else torch.int32)
        for plane in planes[1:]:
            number = 2 * number + plane
        return (number.float() / (2**self.bits - 1)).transpose(-4, -3)


class MixedDensityEventStack(EventRepresentation):
    """Sums of polarities over the whole window, its first half, its first quarter, ...; drop-in for RVT's class.

    Args:
        bins: Number of sums. Bin b leaves the latest 1 - 0.5**(bins - 1 - b) of the window's time out.
        height: Rows of the sensor.
        width: Columns of the sensor.
        count_cutoff: Sums stop at plus and minus this value; None and everything above 127 mean 127. RVT trains with
            32.
        allow_compilation: Accepted for RVT's sake and changes nothing.

    RVT sums in int8 and wraps beyond 127, and raises an IndexError from 33 bins on; here sums are exact, then
    limited, and the newest event stays in the last bin. Events out of range are dropped, times need not be sorted. No
    parameters, no gradients.

    Returns:
        int8 [bins, height, width], or [B, bins, height, width] with `offsets`.
    """

    shown = ("bins", "height", "width", "count_cutoff")

    def __init__(
        self, bins: int, height: int, width: int, count_cutoff: int | None = None, allow_compilation: bool = False
    ):
        super().__init__(height, width)
        if bins < 1 or (count_cutoff is not None and count_cutoff < 1):
            raise ValueError(f"bins and count_cutoff must be at least 1, got {bins} and {count_cutoff}")
        self.bins = bins
        self.count_cutoff = 127 if count_cutoff is None else min(count_cutoff, 127)
        self.allow_compilation = allow_compilation

    def represent(self, x: Tensor, y: Tensor, t: Tensor, p: Tensor, offsets: Tensor | None) -> Tensor:
        x, y, t, p = (column.to(torch.int64) for column in (x, y, t, p))
        window = window_of_event(t, offsets)
        first, last = _window_times(t, offsets)
        # RVT's float32 operations in its order: they decide which bin an event on a border falls into.
        share = (t - first[window]).float() / (last - first).clamp(min=1)[window].float()
        age = torch.log(share.clamp(1e-6, 1 - 1e-6)) / math.log(1 / 2)
        time_bin = (self.bins - age).clamp(min=0).floor().clamp(max=self.bins - 1).long()

        shape = (self.bins, self.height, self.width)
        shape = shape if offsets is None else (offsets.shape[0] - 1, *shape)
        cells = torch.Size(shape).numel()
        cell = ((window * self.bins + time_bin) * self.height + y) * self.width + x
        # Dropped events go into one cell too many.
        sums = torch.zeros(cells + 1, dtype=torch.int32, device=x.device)
        sums.scatter_add_(
            0, torch.where(self.contains(x, y, p), cell, cells), torch.where(p > 0, 1, -1).to(torch.int32)
        )
        stack = sums[:cells].view(shape).cumsum(-3)
        return stack.clamp(-self.count_cutoff, self.count_cutoff).to(torch.int8)

    def construct(self, x: Tensor, y: Tensor, pol: Tensor, time: Tensor) -> Tensor:
        """RVT's name for `forward`."""
        return self(x, y, pol, time)

    def get_shape(self) -> tuple[int, int, int]:
        """Shape of one window's stack."""
        return self.bins, self.height, self.width

    @staticmethod
    def get_torch_dtype() -> torch.dtype:
        """Dtype of the stack."""
        return torch.int8


def _window_times(t: Tensor, offsets: Tensor | None) -> tuple[Tensor, Tensor]:
    """First and last time of every window [B], int64, anything where it has no events."""
    t = t.to(torch.int64)
    if offsets is None and t.shape[0]:
        return tuple(time.view(1) for time in t.aminmax())
    return window_times(t, window_of_event(t, offsets), 1 if offsets is None else offsets.shape[0] - 1)
