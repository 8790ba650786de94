"""Packets of a recording to batches of windows, holding no more than one window and one packet of events.

Windows are RVT's: a window is called by its end T and holds either the events with T - length <= t <= T, so that one
at the border of two belongs to both, or the last so many with t <= T. A window is complete once a later event has been
read. Recordings without events for a while have windows without events, or with old ones, there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from evkernels.events import EventBatch, Events

MOST_WINDOWS = 1_000_000  # 14 hours of 50 ms; a single damaged time would otherwise fill a disk with zeros.


class TooManyWindows(ValueError):
    """The times of a recording span more windows than anyone can mean."""


@dataclass(frozen=True)
class ByTime:
    """Windows of `length` microseconds before their ends."""

    length: int

    def bounds(self, t: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of windows with these ends: the index of the first event, and of the first one after."""
        return np.searchsorted(t, ends - self.length), np.searchsorted(t, ends, side="right")

    def needed(self, parts: list[Events], next_end: int | None) -> list[Events]:
        """The events so far that a window with a later end can hold."""
        stop = int(parts[-1].t[-1]) + 1
        begin = stop if next_end is None else min(next_end - self.length, stop)
        return [part.slice_time(begin, stop) for part in parts]


@dataclass(frozen=True)
class ByCount:
    """Windows of the last `count` events before and at their ends."""

    count: int

    def bounds(self, t: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        stops = np.searchsorted(t, ends, side="right")
        return np.maximum(stops - self.count, 0), stops

    def needed(self, parts: list[Events], next_end: int | None) -> list[Events]:
        kept: list[Events] = []
        missing = 0 if next_end is None else self.count
        for part in reversed(parts):
            kept.insert(0, part.last(missing))
            missing -= len(kept[0])
        return kept


class _Grid:
    """Ends of windows at equal distances, the first one `first` after the first event."""

    def __init__(self, first_time: int, first: int, stride: int):
        self.begin, self.first, self.stride = first_time, first, stride

    def before(self, time: int) -> int:
        """How many windows end before a time."""
        return max(0, -(-(time - self.begin - self.first) // self.stride))

    def total(self, last_time: int) -> int:
        """How many windows it takes to cover a recording, none of them beginning after its last event."""
        return 1 + min(self.before(last_time), (last_time - self.begin) // self.stride)

    def ends(self, begin: int, end: int) -> np.ndarray:
        """Ends of the windows begin to end, int64."""
        return self.begin + self.first + self.stride * np.arange(begin, end, dtype=np.int64)


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
    packets: Iterable[Events], window: ByTime | ByCount, stride_us: int, most: int, ends: np.ndarray | None = None
) -> Iterator[tuple[EventBatch, np.ndarray]]:
    """Cut a recording into windows that end at equal distances, or at given times.

    Args:
        packets: Events in order of time, as `Recording` yields them; none of them empty.
        window: Which events a window holds.
        stride_us: From one end to the next; the first window begins with the first event, or ends a stride after it
            where windows are counted, and the last is the first one that covers the last event.
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
        if schedule is None:
            first = window.length if isinstance(window, ByTime) else stride_us
            schedule = _Grid(int(packet.t[0]), first, stride_us)
        held.append(packet)
        last_time = int(packet.t[-1])
        ready = schedule.before(last_time)
        if ready > done:
            yield from _cut(held, schedule, window, done, ready, most)
            done = ready
        # Between windows far apart, and after the last one, nothing needs to be held; one part keeps the sensor.
        parts = window.needed(held, next(iter(schedule.ends(done, done + 1).tolist()), None))
        held = [part for part in parts if len(part)] or parts[:1]
    if held and schedule.total(last_time) > done:
        yield from _cut(held, schedule, window, done, schedule.total(last_time), most)


def consecutive(packets: Iterable[Events], count: int, most: int) -> Iterator[tuple[EventBatch, np.ndarray]]:
    """Cut a recording into windows of `count` events one after the other; the last holds what is left.

    Args:
        packets, most: As for `batches`.
        count: Events per window.

    Yields:
        A batch and the times of the last events of its windows, int64 [B], 1 <= B <= most.

    Raises:
        TooManyWindows: for more than 1,000,000.
    """
    held: list[Events] = []
    done = 0
    for packet in packets:
        held.append(packet)
        ready = sum(map(len, held)) // count
        if ready:
            done += ready
            _check_number(done)
            whole = _joined(held)
            yield from _counted(whole, count, ready, most)
            held = [whole.last(len(whole) - ready * count)]
    if sum(map(len, held)):
        yield from _counted(_joined(held), count, 1, most)


def _counted(events: Events, count: int, windows: int, most: int) -> Iterator[tuple[EventBatch, np.ndarray]]:
    for index in range(0, windows, most):
        begins = count * np.arange(index, min(index + most, windows), dtype=np.int64)
        stops = np.minimum(begins + count, len(events))
        yield events.batch_of(begins, stops), events.t[stops - 1]


def _cut(held, schedule, window, begin, end, most) -> Iterator[tuple[EventBatch, np.ndarray]]:
    """Windows begin to end of the held events, which become one piece."""
    _check_number(end)
    held[:] = [_joined(held)]
    for index in range(begin, end, most):
        ends = schedule.ends(index, min(index + most, end))
        yield held[0].batch_of(*window.bounds(held[0].t, ends)), ends


def _check_number(windows: int) -> None:
    if windows > MOST_WINDOWS:
        raise TooManyWindows(
            f"expected at most {MOST_WINDOWS:,} windows, got {windows:,}: damaged times, or short windows"
        )


def _joined(parts: list[Events]) -> Events:
    if len(parts) == 1:
        return parts[0]
    columns = (np.concatenate([getattr(part, name) for part in parts]) for name in "xytp")
    return Events(*columns, parts[0].width, parts[0].height)
