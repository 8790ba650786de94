"""Images of events as modules over `evkernels.nn.functional`: event image, event-count image, Bina-Rep, RVT's stack."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evkernels.nn import functional
from evkernels.nn.event_representation import EventRepresentation
from evkernels.nn.functional.event_images import (
    BLUE,
    LARGEST_SUM,
    RED,
    WHITE,
    Colour,
    check_bina_rep,
    palette_of,
)


class EventImage(EventRepresentation):
    """Colour image in which the last event of a pixel wins; EventGPT's picture of an event window.

    Args:
        height: Rows of the sensor.
        width: Columns of the sensor.
        on: Red, green and blue of ON events, 0 to 255 each.
        off: The same of OFF events.
        background: The same of pixels without events.

    No parameters, no gradients. See `evkernels.nn.functional.event_image`.

    Returns:
        uint8 [height, width, 3], or [B, height, width, 3] with `offsets` or EventBatch.
    """

    function = staticmethod(functional.event_image)

    def __init__(self, height: int, width: int, on: Colour = RED, off: Colour = BLUE, background: Colour = WHITE):
        super().__init__(height, width)
        self.register_buffer("palette", palette_of((background, off, on)), persistent=False)

    def arguments(self) -> dict[str, Any]:
        return {**super().arguments(), "palette": self.palette}

    def extra_repr(self) -> str:
        background, off, on = (tuple(colour) for colour in self.palette.tolist())
        return f"{super().extra_repr()}, on={on}, off={off}, background={background}"


class EventCountImage(EventRepresentation):
    """Counts and last times of both polarities: EV-FlowNet's four channels.

    Args:
        height: Rows of the sensor.
        width: Columns of the sensor.

    No parameters, no gradients. See `evkernels.nn.functional.event_count_image`.

    Returns:
        float32 [4, height, width], or [B, 4, height, width] with `offsets` or EventBatch: number of ON and of OFF
        events, time of the last ON and of the last OFF event, 0 for the first event of the window to 1 for the last.
    """

    function = staticmethod(functional.event_count_image)


class BinaRep(EventRepresentation):
    """Bina-Rep: `bits` binary frames of consecutive times read as one number, the first as its most significant bit.

    Args:
        bits: Binary frames per number, 1 to 24. With 1 the result is the binary frame itself.
        height: Rows of the sensor.
        width: Columns of the sensor.
        frames: Results per window, one after the other in time.

    No parameters, no gradients. See `evkernels.nn.functional.bina_rep`.

    Returns:
        float32 [frames, 2, height, width] in 0 to 1, OFF before ON, or [B, frames, 2, height, width] with `offsets` or
        EventBatch.
    """

    function = staticmethod(functional.bina_rep)
    shown = ("bits", "height", "width", "frames")

    def __init__(self, bits: int, height: int, width: int, frames: int = 1):
        super().__init__(height, width)
        check_bina_rep(bits, frames)
        self.bits = bits
        self.frames = frames


class MixedDensityEventStack(EventRepresentation):
    """Sums of polarities over the whole window, its first half, its first quarter, ...; drop-in for RVT's class.

    Args:
        bins: Number of sums. Bin b leaves the latest 1 - 0.5**(bins - 1 - b) of the window's time out.
        height: Rows of the sensor.
        width: Columns of the sensor.
        count_cutoff: Sums stop at plus and minus this value; None and everything above 127 mean 127. RVT trains with
            32.
        allow_compilation: Accepted for RVT's sake and changes nothing.

    No parameters, no gradients. See `evkernels.nn.functional.mixed_density_event_stack`, also for what RVT's wraps.

    Returns:
        int8 [bins, height, width], or [B, bins, height, width] with `offsets` or EventBatch.
    """

    function = staticmethod(functional.mixed_density_event_stack)
    shown = ("bins", "height", "width", "count_cutoff")

    def __init__(
        self, bins: int, height: int, width: int, count_cutoff: int | None = None, allow_compilation: bool = False
    ):
        super().__init__(height, width)
        if bins < 1 or (count_cutoff is not None and count_cutoff < 1):
            raise ValueError(f"bins and count_cutoff must be at least 1, got {bins} and {count_cutoff}")
        self.bins = bins
        self.count_cutoff = LARGEST_SUM if count_cutoff is None else min(count_cutoff, LARGEST_SUM)
        self.allow_compilation = allow_compilation

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
