"""Stacked event histogram as a module: RVT's class of the same name on the fused op."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from evkernels import ops
from evkernels.nn import event_input

if TYPE_CHECKING:
    from evkernels.nn.event_input import EventInput


class StackedHistogram(nn.Module):
    """Counts events per polarity, time bin and pixel; drop-in for RVT's `StackedHistogram`.

    Args:
        bins: Number of time bins, spread from the first to the last event of a window.
        height: Rows of the histogram, which are the sensor's unless there is a `pixel_map`.
        width: Columns of the histogram, likewise.
        count_cutoff: Counters stop at this value; None and everything above 255 mean 255. RVT trains with 10.
        fastmode: Accepted for RVT's sake and changes nothing: there it chooses counters of 8 bits that wrap at 256, or
            of 16 bits that wrap at 32768. These counters stop at `count_cutoff`, so that a hot pixel does not turn
            dark; below 256 events per cell all three agree bit for bit.
        pixel_map: Where the sensor's pixels lie in the image, int32 [H, W] as of `evkernels.events.pixel_map`: flip,
            crop, downsampling, rectification and removal of pixels in the same pass. None: the sensor is the image.

    Events outside the sensor are dropped, where RVT counts them in another pixel's cell; times need not be sorted.
    No parameters, no gradients. See `evkernels.ops.event_histogram`.
    """

    def __init__(
        self,
        bins: int,
        height: int,
        width: int,
        count_cutoff: int | None = None,
        fastmode: bool = True,
        pixel_map: Tensor | None = None,
    ):
        super().__init__()
        if count_cutoff is not None and count_cutoff < 1:
            raise ValueError(f"count_cutoff must be at least 1, got {count_cutoff}")
        self.bins = bins
        self.height = height
        self.width = width
        self.count_cutoff = 255 if count_cutoff is None else min(count_cutoff, 255)
        self.fastmode = fastmode
        self.register_buffer("pixel_map", pixel_map, persistent=False)

    def forward(
        self,
        x: EventInput,
        y: Tensor | None = None,
        pol: Tensor | None = None,
        time: Tensor | None = None,
        offsets: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """The histogram of one window, or of each window of a batch.

        Args:
            x: Columns [E], any integer dtype; or, with nothing else, `evkernels.events.Events`, `EventBatch` or a
                structured NumPy array with fields x, y, t, p.
            y: Rows [E], any integer dtype.
            pol: Polarities [E]: 1 is ON, 0 and -1 are OFF.
            time: Timestamps [E], int64 or int32.
            offsets: Cuts a batch of windows out of the events, int64 [B + 1], see `evkernels.ops.event_histogram`.
            out: Takes the result, which is then `out` itself; see `evkernels.ops.event_histogram`.

        Returns:
            uint8 [2*bins, height, width], OFF bins first, or [B, 2*bins, height, width] with `offsets` or EventBatch.
        """
        x, y, t, p, offsets = event_input.columns(x, y, pol, time, offsets)
        return ops.event_histogram(
            x,
            y,
            t,
            p,
            bins=self.bins,
            height=self.height,
            width=self.width,
            count_cutoff=self.count_cutoff,
            offsets=offsets,
            pixel_map=self.pixel_map,
            out=out,
        )

    def construct(self, x: Tensor, y: Tensor, pol: Tensor, time: Tensor) -> Tensor:
        """RVT's name for `forward`."""
        return self(x, y, pol, time)

    def get_shape(self) -> tuple[int, int, int]:
        """Shape of one window's histogram."""
        return 2 * self.bins, self.height, self.width

    @staticmethod
    def get_torch_dtype() -> torch.dtype:
        """Dtype of the histogram."""
        return torch.uint8

    def extra_repr(self) -> str:
        return f"bins={self.bins}, height={self.height}, width={self.width}, count_cutoff={self.count_cutoff}"
