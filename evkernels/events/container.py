"""Events of one recording as four arrays, checked once.

Structure of arrays and not an array of structures: every kernel reads columns, and a window is then four slices of
the same memory. Checks cost one pass over the data, so they run on construction only; windows are cut from events that
have passed and are not checked again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from .batch import EventBatch

_DTYPES = {
    "t": ("int64",),
    "x": ("uint16", "int16", "int32"),
    "y": ("uint16", "int16", "int32"),
    "p": ("uint8",),
}


@dataclass(frozen=True, eq=False, repr=False)
class Events:
    """Events of one sensor.

    Args:
        x: Column, uint16, int16 or int32 [E], 0 <= x < width.
        y: Row, same types [E], 0 <= y < height.
        t: Timestamp in microseconds, int64 [E]; any order, but windows need non-decreasing times.
        p: Polarity, uint8 [E], 0 = darker (OFF), 1 = brighter (ON).
        width, height: Sensor size in pixels.

    The arrays are kept, not copied, and never written to: changing them afterwards bypasses the checks.

    Raises:
        ValueError: if a type, length or value is not as above; for events outside the sensor the message counts them.
    """

    x: np.ndarray
    y: np.ndarray
    t: np.ndarray
    p: np.ndarray
    width: int
    height: int

    def __post_init__(self) -> None:
        for name in ("width", "height"):
            size = getattr(self, name)
            if isinstance(size, (bool, np.bool_)) or not isinstance(size, (int, np.integer)) or size < 1:
                raise ValueError(f"{name} must be a positive integer, got {size!r}")
            object.__setattr__(self, name, int(size))
        for name, dtypes in _DTYPES.items():
            column = getattr(self, name)
            if not isinstance(column, np.ndarray):
                raise ValueError(f"{name} must be a NumPy array, got {type(column).__name__}")
            if column.dtype.name not in dtypes:
                raise ValueError(f"{name} must have dtype {' or '.join(dtypes)}, got {column.dtype}")
            if column.shape != (len(self),):
                raise ValueError(f"{name} must be [E] with E = len(t) = {len(self)}, got shape {column.shape}")
        if len(self) == 0:
            return
        for name, size in (("x", self.width), ("y", self.height)):
            column = getattr(self, name)
            low, high = int(column.min()), int(column.max())
            if low < 0 or high >= size:
                outside = int(np.count_nonzero((column < 0) | (column >= size)))
                raise ValueError(
                    f"{name} must be in 0..{size - 1} (sensor {self.width}x{self.height}), "
                    f"got {low}..{high}: {outside} of {len(self)} events are outside"
                )
        if int(self.p.max()) > 1:
            invalid = int(np.count_nonzero(self.p > 1))
            raise ValueError(
                f"p must be 0 or 1, got up to {int(self.p.max())}: {invalid} of {len(self)} events are not"
            )

    def __len__(self) -> int:
        return self.t.shape[0] if self.t.ndim else 0

    def __repr__(self) -> str:
        return f"Events({len(self)} events, {self.width}x{self.height}, {self.duration} us)"

    @cached_property
    def is_sorted(self) -> bool:
        """Whether timestamps never decrease."""
        return bool(np.all(self.t[1:] >= self.t[:-1]))

    @property
    def duration(self) -> int:
        """Time from the earliest to the latest event in microseconds; 0 without events."""
        if len(self) == 0:
            return 0
        first, last = (self.t[0], self.t[-1]) if self.is_sorted else (self.t.min(), self.t.max())
        return int(last) - int(first)

    def sorted(self) -> Events:
        """Events ordered by time; events of equal time keep their order.

        Returns:
            These events themselves if already sorted, else new arrays.
        """
        if self.is_sorted:
            return self
        order = np.argsort(self.t, kind="stable")
        return Events(self.x[order], self.y[order], self.t[order], self.p[order], self.width, self.height)

    def slice_time(self, start: int, stop: int) -> Events:
        """Events with start <= t < stop.

        Args:
            start, stop: Microseconds; integers, so that no boundary is lost to rounding at times near 1.6e15.

        Returns:
            Events whose arrays are views of these.

        Raises:
            ValueError: if the events are not sorted or start > stop.
            TypeError: if a bound is not an integer.
        """
        self._require_sorted()
        start, stop = _integer("start", start), _integer("stop", stop)
        if start > stop:
            raise ValueError(f"start must not exceed stop, got start {start} and stop {stop}")
        return self._part(self._first_at(start), self._first_at(stop))

    def last(self, count: int) -> Events:
        """The last `count` events, or all where there are fewer.

        Returns:
            Events whose arrays are views of these.

        Raises:
            ValueError: if the events are not sorted or the count is negative.
            TypeError: if it is not an integer.
        """
        self._require_sorted()
        if _integer("count", count) < 0:
            raise ValueError(f"count must not be negative, got {count}")
        return self._part(max(0, len(self) - count), len(self))

    def windows(self, duration_us: int | None = None, count: int | None = None) -> Iterator[Events]:
        """Consecutive windows, by time or by number of events.

        Args:
            duration_us: Length in microseconds. Windows are half-open, start at the first event, cover the last one and
                include empty ones in between.
            count: Events per window; the last window holds what is left.

        Returns:
            Iterator over Events whose arrays are views of these. Nothing for no events.

        Raises:
            ValueError: unless exactly one length is given and positive, or if the events are not sorted.
            TypeError: if the length is not an integer.
        """
        length = self._window_length(duration_us, count)
        return self._by_count(length) if duration_us is None else self._by_time(length)

    def batch(
        self,
        duration_us: int | None = None,
        count: int | None = None,
        *,
        start: int | None = None,
        stride: int | None = None,
        number: int | None = None,
    ) -> EventBatch:
        """Windows as one batch: a single op call then makes the representations of all of them.

        Args:
            duration_us: Length of a window in microseconds; half-open, like those of `windows`.
            count: Events per window, in place of `duration_us`; the last windows hold what is left.
            start: Time at which the first window begins, in microseconds. None: the first event's.
            stride: From the beginning of a window to that of the next, in microseconds or in events; smaller than the
                length, windows overlap, larger, events between them are left out. None: the length.
            number: How many windows. None: as long as they begin no later than the last event.

        Returns:
            EventBatch on the CPU. Its columns are views of these arrays where windows follow each other without gap or
            overlap, else copies.

        Raises:
            ValueError: unless exactly one length is given; if a length, `stride` or `number` is not positive (`number`
                may be 0), the events are not sorted, `start` is outside int64, or more than 2**31 windows would come.
            TypeError: if an argument is not an integer.
        """
        length = self._window_length(duration_us, count)
        stride = length if stride is None else _positive("stride", stride)
        return self._batch(*self._bounds(length, stride, start, number, by_time=count is None))

    def batch_between(self, starts: np.ndarray, stops: np.ndarray) -> EventBatch:
        """Windows at given times as one batch: window b holds the events with starts[b] <= t < stops[b].

        Args:
            starts, stops: Microseconds, int64 [B] each, in any order; windows may overlap.

        Returns:
            EventBatch as of `batch`.

        Raises:
            ValueError: if a shape or dtype differs, a start exceeds its stop, or the events are not sorted.
        """
        self._require_sorted()
        starts, stops = _like_each_other(starts=starts, stops=stops)
        if (starts > stops).any():
            raise ValueError(f"starts must not exceed stops, got {int((starts > stops).sum())} that do")
        return self._batch(np.searchsorted(self.t, starts), np.searchsorted(self.t, stops))

    def batch_of(self, begins: np.ndarray, ends: np.ndarray) -> EventBatch:
        """Windows of given events as one batch: window b holds the events begins[b] to ends[b], the latter excluded.

        Args:
            begins, ends: Indices, int64 [B] each, in any order; windows may overlap.

        Returns:
            EventBatch as of `batch`.

        Raises:
            ValueError: if a shape or dtype differs, or not 0 <= begins[b] <= ends[b] <= E.
        """
        begins, ends = _like_each_other(begins=begins, ends=ends)
        wrong = (begins < 0) | (begins > ends) | (ends > len(self))
        if wrong.any():
            raise ValueError(f"windows must be 0 <= begin <= end <= {len(self)}, got {int(wrong.sum())} that are not")
        return self._batch(begins, ends)

    def _batch(self, begins: np.ndarray, ends: np.ndarray) -> EventBatch:
        from .batch import EventBatch, _joined, _offsets

        if begins.size and np.array_equal(begins[1:], ends[:-1]):
            parts = [slice(int(begins[0]), int(ends[-1]))]
        else:
            parts = [slice(begin, end) for begin, end in zip(begins.tolist(), ends.tolist(), strict=True)]
        columns = ([getattr(self, name)[part] for part in parts] or [getattr(self, name)[:0]] for name in "xytp")
        tensors = [_joined(column, name) for name, column in zip("xytp", columns, strict=True)]
        return EventBatch(*tensors, _offsets(ends - begins), self.width, self.height)

    def tensors(self, device: str | torch.device = "cpu") -> tuple[torch.Tensor, ...]:
        """The columns as tensors, ready for evkernels.ops.

        Args:
            device: Where to put them.

        Returns:
            x, y: int16 [E], or int32 if the sensor has more than 32,768 columns or rows (PyTorch computes little in
            uint16). t: int64 [E]. p: uint8 [E]. Copies: writing to them leaves these events as they are.
        """
        import torch

        coordinate = np.int16 if max(self.width, self.height) <= 32768 else np.int32
        columns = (self.x.astype(coordinate), self.y.astype(coordinate), self.t.copy(), self.p.copy())
        return tuple(torch.from_numpy(column).to(device) for column in columns)

    def _window_length(self, duration_us: int | None, count: int | None) -> int:
        if (duration_us is None) == (count is None):
            raise ValueError(f"give exactly one of duration_us and count, got {duration_us} and {count}")
        self._require_sorted()
        return _positive("count", count) if duration_us is None else _positive("duration_us", duration_us)

    def _bounds(
        self, length: int, stride: int, start: int | None, number: int | None, by_time: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the first event of each window and of the first after it, int64 [B] each."""
        start = _integer("start", (self.t[0] if len(self) else 0) if start is None else start)
        if not np.iinfo(np.int64).min <= start <= np.iinfo(np.int64).max:
            raise ValueError(f"start must be an int64 time, got {start}")
        first = start if by_time else self._first_at(start)
        if number is None:
            last = (int(self.t[-1]) if by_time else len(self) - 1) if len(self) else first - 1
            number = max(0, (last - first) // stride + 1)
        if not 0 <= _integer("number", number) <= 2**31:
            raise ValueError(f"windows must be at most 2**31, got {number}")
        if not by_time:
            begins = np.minimum(first + np.arange(number) * min(stride, len(self)), len(self))
            return begins, np.minimum(begins + min(length, len(self)), len(self))
        return self._indices(first, stride, number), self._indices(first + length, stride, number)

    def _indices(self, first: int, stride: int, number: int) -> np.ndarray:
        """Of the events at or after the times first + stride * arange(number)."""
        # Times after the last event may lie beyond int64; as they need no search, none is computed.
        inside = min(number, max(0, (int(self.t[-1]) - first) // stride + 1)) if len(self) else 0
        indices = np.full(number, len(self), np.int64)
        if inside:
            times = np.int64(first) + np.arange(inside, dtype=np.int64) * np.int64(min(stride, np.iinfo(np.int64).max))
            indices[:inside] = np.searchsorted(self.t, times, side="left")
        return indices

    def _by_count(self, count: int) -> Iterator[Events]:
        for begin in range(0, len(self), count):
            yield self._part(begin, min(begin + count, len(self)))

    def _by_time(self, duration_us: int) -> Iterator[Events]:
        begin, stop = 0, int(self.t[0]) if len(self) else 0
        while begin < len(self):
            stop += duration_us
            end = self._first_at(stop)
            yield self._part(begin, end)
            begin = end

    def _first_at(self, time: int) -> int:
        # Outside int64, NumPy would compare as float64 and round microseconds near 1.6e15 away from each other.
        if time > np.iinfo(np.int64).max:
            return len(self)
        return int(np.searchsorted(self.t, np.int64(max(time, np.iinfo(np.int64).min)), side="left"))

    def _part(self, begin: int, end: int) -> Events:
        part = object.__new__(Events)
        for name in ("x", "y", "t", "p"):
            object.__setattr__(part, name, getattr(self, name)[begin:end])
        object.__setattr__(part, "width", self.width)
        object.__setattr__(part, "height", self.height)
        part.__dict__["is_sorted"] = True
        return part

    def _require_sorted(self) -> None:
        if not self.is_sorted:
            late = int(np.count_nonzero(self.t[1:] < self.t[:-1]))
            raise ValueError(f"t must be non-decreasing, got {late} events earlier than the one before; use sorted()")


def _like_each_other(**arrays: np.ndarray) -> list[np.ndarray]:
    """The arrays, if they are int64 [B] with one B."""
    first = next(iter(arrays))
    for name, values in arrays.items():
        values = np.asarray(values)
        if values.dtype != np.int64 or values.ndim != 1 or values.shape != np.shape(arrays[first]):
            raise ValueError(f"{name} must be int64 [B] like {first}, got {values.dtype} {list(values.shape)}")
    return [np.asarray(values) for values in arrays.values()]


def _positive(name: str, value: object) -> int:
    if _integer(name, value) < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def _integer(name: str, value: object) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return int(value)
