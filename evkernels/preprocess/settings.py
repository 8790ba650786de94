"""What is made of every recording, and the names that RVT's data loader looks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from torch import nn

from evkernels.nn import StackedHistogram

# Each makes a module of `height` rows and `width` columns that takes an EventBatch and drops events outside.
REPRESENTATIONS: dict[str, Callable[[Settings, int, int], nn.Module]] = {
    "stacked_histogram": lambda settings, height, width: StackedHistogram(
        settings.bins, height, width, settings.count_cutoff
    ),
}


@dataclass(frozen=True)
class Settings:
    """Arguments of a representation and of the windows it is made of.

    Args:
        representation: Key of REPRESENTATIONS.
        bins: Time bins of a window.
        count_cutoff: Largest count; None is the representation's own largest.
        window_us: Length of a window in microseconds.
        stride_us: From the end of one window to that of the next.
        downsample: Keep one pixel of this many in each direction.
        labels: Whether windows end with the boxes of a `_bbox.npy` beside the recording, where there is one.
        sensor: (width, height) for recordings that do not say it.
    """

    representation: str = "stacked_histogram"
    bins: int = 10
    count_cutoff: int | None = None
    window_us: int = 50_000
    stride_us: int = 50_000
    downsample: int = 1
    labels: bool = True
    sensor: tuple[int, int] | None = None

    @property
    def folder(self) -> str:
        """Name of the representation's folder, as RVT spells it: dt is the window's length in milliseconds."""
        step = "" if self.stride_us == self.window_us else f"_step={self.stride_us / 1000:.10g}"
        return f"{self.representation}_dt={self.window_us / 1000:.10g}{step}_nbins={self.bins}"

    @property
    def file(self) -> str:
        """Name of the file."""
        return f"event_representations{'' if self.downsample == 1 else f'_ds{self.downsample}_nearest'}.h5"

    def describe(self) -> dict:
        """All of them, for the record in the file."""
        return asdict(self)
