"""Packets of a recording to batches of windows, holding no more than one window and one packet of events.

Windows are RVT's: a window is called by its end T and holds the events with T - length <= t <= T, so that one at the
border of two belongs to both. A window is complete once a later event has been read. Recordings without events for
a while have windows without events there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from evkernels.events import EventBatch, Events

MOST_WINDOWS = 1_000_000  # 14 hours of 50 ms; a single damaged time would otherwise fill a disk with zeros.


class TooManyWindows(ValueError):
    """The times of a recording span more windows than anyone can mean."""


class _Grid:
    """Ends of windows at equal distances, the first window beginning with the first event."""

    def __init__(self, first_time: int, window_us: int, stride_us: int):
        self.begin, self.window, self.stride = first_time, window_us, stride_us

    def before(self, time: int) -> int:
        """How many windows end before a time."""
        return max(0, -(-(time - self.begin - self.window) // self.stride))

    def total(self, last_time: int) -> int:
        """How many windows it takes to cover a recording, none of them beginning after its last event."""
        return 1 + min(self.before(last_time), (last_time - self.begin) // self.stride)

    def ends(self, begin: int, end: int) -> np.ndarray:
        """Ends of the windows begin to end, int64."""
        return self.begin + self.window + self.stride * np.arange(begin, end, dtype=np.int64)


class _Given:
    """Ends of windows given one by one, non-decreasing."""

    def __init__(self, ends: np.ndarray):
        self.times = np.asarray(ends, np.int64)

    def before(self, time: int) -> int:
        return int(np.searchsorted(self.times, time))

    def total(self, last_time: int) -> int:
        return len(self.times)

    def ends(self, begin: int, end: int) -> np.ndarray:
        return self.times[begin:end]


def batches(
    packets: Iterable[Events], window_us: int, stride_us: int, most: int, ends: np.ndarray | None = None
) -> Iterator[tuple[EventBatch, np.ndarray]]:
    """Cut a recording into windows.

    Args:
        packets: Events in order of time, as `Recording` yields them; none of them empty.
        window_us: Length of a window.
        stride_us: From one end to the next; the first window begins with the first event, the last is the first
            one that covers the last event.
        most: Windows per batch.
        ends: Ends of the windows in microseconds, int64, non-decreasing, in place of that grid.

    Yields:
        A batch and the ends of its windows, int64 [B], 1 <= B <= most.

    Raises:
        TooManyWindows: for more than 1,000,000.
    """
    schedule = None if ends is None else _Given(ends)
    held: list[Events] = []
    done, last_time = 0, 0
    for packet in packets:
        schedule = schedule or _Grid(int(packet.t[0]), window_us, stride_us)
        held.append(packet)
        last_time = int(packet.t[-1])
        ready = schedule.before(last_time)
        if ready > done:
            yield from _cut(held, schedule, done, ready, window_us, most)
            done = ready
        # Between windows far apart, and after the last one, nothing needs to be held; one part keeps the sensor.
        following = (schedule.ends(done, done + 1) - window_us).tolist()
        begin = min([*following, last_time + 1])
        parts = [part.slice_time(begin, last_time + 1) for part in held]
        held = [part for part in parts if len(part)] or parts[:1]
    if held and schedule.total(last_time) > done:
        yield from _cut(held, schedule, done, schedule.total(last_time), window_us, most)


def _cut(held, schedule, begin, end, window_us, most) -> Iterator[tuple[EventBatch, np.ndarray]]:
    """Windows begin to end of the held events, which become one piece."""
    if end > MOST_WINDOWS:
        raise TooManyWindows(f"expected at most {MOST_WINDOWS:,} windows, got {end:,}: damaged times, or short windows")
    held[:] = [_joined(held)]
    for index in range(begin, end, most):
        ends = schedule.ends(index, min(index + most, end))
        yield held[0].batch_between(ends - window_us, ends + 1), ends


def _joined(parts: list[Events]) -> Events:
    if len(parts) == 1:
        return parts[0]
    columns = (np.concatenate([getattr(part, name) for part in parts]) for name in "xytp")
    return Events(*columns, parts[0].width, parts[0].height)
