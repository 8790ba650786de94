"""What is made of every recording, and the names that RVT's data loader looks for."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from evkernels.arguments import InputError
from evkernels.preprocess.windows import ByCount, ByTime


@dataclass(frozen=True)
class Settings:
    """Arguments of a representation and of the windows it is made of.

    Args:
        representation: Key of `representations.REPRESENTATIONS`.
        bins: Time bins of a window, where the representation has some.
        count_cutoff: Largest count; None is the representation's own largest.
        convention: Of a voxel grid.
        normalize: Of a voxel grid, "e2vid", "dsec" or None.
        tau_us: Time constant of a time surface, or of averaged ones, in microseconds.
        depth: How many events of a pixel and polarity a TORE volume remembers.
        window_us: Length of a window in microseconds.
        window_events: Number of events of a window, in place of its length.
        stride_us: From the end of one window to that of the next. None: windows of events follow one another.
        downsample: Keep one pixel of this many in each direction.
        labels: Whether windows end with the boxes of a `_bbox.npy` beside the recording, where there is one.
        sensor: (width, height) for recordings that do not say it.
    """

    representation: str = "stacked_histogram"
    bins: int | None = 10
    count_cutoff: int | None = None
    convention: str | None = None
    normalize: str | None = None
    tau_us: int | None = None
    depth: int | None = None
    window_us: int = 50_000
    window_events: int | None = None
    stride_us: int | None = 50_000
    downsample: int = 1
    labels: bool = True
    sensor: tuple[int, int] | None = None

    @property
    def window(self) -> ByTime | ByCount:
        """Which events a window holds."""
        return ByTime(self.window_us) if self.window_events is None else ByCount(self.window_events)

    @property
    def window_name(self) -> str:
        """The windows in a folder's name, as RVT spells them: dt is the length in ms, ne the number of events."""
        if self.window_events is None:
            step = "" if self.stride_us == self.window_us else f"_step={_milliseconds(self.stride_us)}"
            return f"dt={_milliseconds(self.window_us)}{step}"
        step = "" if self.stride_us is None else f"_step={_milliseconds(self.stride_us)}"
        return f"ne={self.window_events}{step}"

    @classmethod
    def of(cls, representation: str, **options: object) -> Settings:
        """Settings in which the options that are None are what the representation usually takes.

        Raises:
            InputError: for an option that the representation does not have, or a cutoff beyond what it counts to.
        """
        from evkernels.preprocess.representations import OPTIONS, REPRESENTATIONS

        defaults = REPRESENTATIONS[representation].defaults
        for name in OPTIONS:
            if options.get(name) is not None and name not in defaults:
                raise InputError(f"--{OPTIONS[name]} is no option of {representation}")
        cutoff, largest = options.get("count_cutoff"), REPRESENTATIONS[representation].largest_count
        if cutoff is not None and cutoff > largest:
            raise InputError(f"--count-cutoff of {representation} must be at most {largest}, got {cutoff}")
        given = {name: value for name, value in options.items() if value is not None or name not in defaults}
        return cls(representation, **{**defaults, **given})

    @property
    def file(self) -> str:
        """Name of the file."""
        return f"event_representations{'' if self.downsample == 1 else f'_ds{self.downsample}_nearest'}.h5"

    def describe(self) -> dict:
        """All of them, for the record in the file."""
        return asdict(self)


def _milliseconds(us: int) -> str:
    return f"{us / 1000:.10g}"
