"""Images of a stream of events, kept up to date packet by packet: for cameras, and for recordings of any length.

The work is done by `evkernels._host`, without Python's lock. Where that is not built, NumPy does the same, slower.
"""

from __future__ import annotations

import importlib
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from .batch import _FIELDS
from .container import Events, _positive

NEVER = np.iinfo(np.int64).min
_COLUMNS = ("x", "y", "t", "p")
_MOST_PIXELS = 2**31 - 1
# In native byte order; times of 64 bits without a sign must be looked at.
_INTEGERS = frozenset(np.dtype(kind + size) for kind in "iu" for size in "1248")
_TIMES = _INTEGERS - {np.dtype(np.uint64)}
_POLARITIES = _INTEGERS | {np.dtype(np.bool_)}


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What an `EventAccumulator` held at one moment.

    Args:
        counts: Events per pixel, int32 [polarities, height, width], OFF before ON, stopping at 2**31 - 1. None if not
            kept.
        times: Time of the last event, int64 of the same shape, -2**63 where none came. None if not kept.
        events: How many events were added since the images were last cleared.
        dropped: How many were left out since then because they are out of range.

    The arrays belong to the snapshot alone.
    """

    counts: np.ndarray | None
    times: np.ndarray | None
    events: int
    dropped: int

    def decayed(
        self, tau: float, at: int | None = None, decay: Literal["exponential", "linear"] = "exponential"
    ) -> np.ndarray:
        """What a decay leaves of the last event of every pixel.

        Args:
            tau: Time constant in the unit of the timestamps.
            at: Time to which events decay; None: that of the latest event.
            decay: "exponential" leaves exp(-age / tau), "linear" max(0, 1 - age / tau).

        Returns:
            float32 [polarities, height, width] in 0 to 1, 0 where no event came. See `evkernels.ops.time_surface`.

        Raises:
            ValueError: if times are not kept, or as the op.
        """
        if self.times is None:
            raise ValueError("decayed() needs the last times, but the accumulator was made with times=False")
        import torch

        from evkernels import ops

        polarities, height, width = self.times.shape
        none = torch.zeros(0, dtype=torch.int64)
        surface = torch.from_numpy(self.times)
        sizes = {"height": height, "width": width, "polarities": polarities}
        return ops.time_surface(none, none, none, none, **sizes, surface=surface, tau=tau, at=at, decay=decay).numpy()


class EventAccumulator:
    """Counts and last times per pixel of a stream of events, for one thread to add to and others to look at.

    Equivalent to, for the events since the last clearing::

        np.add.at(counts, (p, y, x), 1)
        np.maximum.at(times, (p, y, x), t)

    Args:
        height: Rows of the sensor.
        width: Columns of the sensor.
        polarities: 2 gives OFF and ON events an image each, in this order; 1 takes them together.
        counts: Whether to keep the number of events.
        times: Whether to keep the time of the last event.
        out_of_range: "raise" refuses a packet with events outside the sensor or of another polarity than 1, 0 and -1;
            "drop" leaves those events out and counts them.

    Events are not stored: the memory is that of the images, and of as many again while a snapshot is taken. Any number
    of threads may add and look at once: a packet is in a snapshot as a whole or not at all. A thread that adds waits
    for one that looks only while the images are copied, or exchanged for empty ones where the snapshot clears them.
    Python's lock is not held meanwhile. Order does not matter, as the latest time wins, however late it comes.

    Raises:
        ValueError: if a size is no sensor's, or nothing is to be kept.
        TypeError: if a size is no integer.
    """

    def __init__(
        self,
        height: int,
        width: int,
        *,
        polarities: Literal[1, 2] = 2,
        counts: bool = True,
        times: bool = True,
        out_of_range: Literal["raise", "drop"] = "raise",
    ):
        self.height, self.width = _positive("height", height), _positive("width", width)
        if self.height * self.width > _MOST_PIXELS:
            raise ValueError(f"height * width must be at most {_MOST_PIXELS}, got {height} * {width}")
        if polarities not in (1, 2):
            raise ValueError(f"polarities must be 1 or 2, got {polarities!r}")
        if not (counts or times):
            raise ValueError("counts or times must be kept, got False for both")
        if out_of_range not in ("raise", "drop"):
            raise ValueError(f'out_of_range must be "raise" or "drop", got {out_of_range!r}')
        self.polarities = polarities
        kept = {"times": bool(times), "counts": bool(counts), "drop": out_of_range == "drop"}
        self._images = _implementation()(self.height, self.width, polarities, **kept)

    def push(self, x: Any, y: Any = None, t: Any = None, p: Any = None) -> int:
        """Adds a packet of events.

        Args:
            x: Columns [E] of a sensor; or, with nothing else, Events or a structured array with fields x, y, t (ts,
                time, timestamp) and p (pol, polarity, on), read in place.
            y: Rows [E].
            t: Timestamps [E] in any unit and order, within int64.
            p: Polarities [E]: 1 is ON, 0 and -1 are OFF.

        Columns are arrays of any integer dtype, p of bool too, with any strides; nothing is copied.

        Returns:
            How many events were added.

        Raises:
            TypeError: if a column holds no integers, or columns are missing.
            ValueError: if shapes differ, a field is missing or, unless they are dropped, events are out of range.
                Nothing of a packet that raises is added.
        """
        columns = (x, y, t, p) if y is not None else _columns(x, y, t, p)
        if not _are_good(*columns):
            columns = _checked(*columns)
        added = self._images.push(*columns)
        if added < 0:
            raise ValueError(self._out_of_range(*columns))
        return added

    def snapshot(self, *, clear: bool = False) -> Snapshot:
        """The images as they are.

        Args:
            clear: Begin anew, so that the next snapshot has the events after this one: between them none is lost or
                counted twice.
        """
        return Snapshot(*self._images.snapshot(bool(clear)))

    def clear(self) -> None:
        """Forgets all events."""
        self._images.snapshot(True)

    def _out_of_range(self, x, y, t, p) -> str:
        limits = {"x": (x, 0, self.width - 1), "y": (y, 0, self.height - 1), "p": (p, -1, 1)}
        for name, (column, low, high) in limits.items():
            column = column.astype(np.int8) if column.dtype == np.bool_ else column
            outside = (column < low) | (column > high)
            if outside.any():
                first = int(np.argmax(outside))
                return (
                    f"{name} must be in {low}..{high}, got {int(column[first])} for event {first} and "
                    f"{int(outside.sum())} of {len(column)} events outside; none of the packet was added"
                )
        return "the packet was written to while it was read; none of it was added"

    def __repr__(self) -> str:
        return f"EventAccumulator(height={self.height}, width={self.width}, polarities={self.polarities})"


def _columns(x: Any, y: Any, t: Any, p: Any) -> tuple[Any, Any, Any, Any]:
    """The columns of any form of events."""
    others = {"y": y, "t": t, "p": p}
    given = [name for name, column in others.items() if column is not None]
    fields = getattr(getattr(x, "dtype", None), "names", None)
    if not fields and not isinstance(x, Events):
        missing = [name for name in others if name not in given]
        if missing:
            raise TypeError(f"events given as columns must be x, y, t, p, got no {', '.join(missing)}")
        return x, y, t, p
    if given:
        raise TypeError(f"{type(x).__name__} holds all columns, but got {', '.join(given)} beside it")
    if not fields:
        return x.x, x.y, x.t, x.p
    names = _names(fields)
    return x[names[0]], x[names[1]], x[names[2]], x[names[3]]


@lru_cache
def _names(fields: tuple[str, ...]) -> list[str]:
    """Those of x, y, t and p among the fields of a structured array."""
    found = [next((field for field in _FIELDS[name] if field in fields), None) for name in _COLUMNS]
    if None in found:
        absent = _FIELDS[_COLUMNS[found.index(None)]]
        raise ValueError(f"events must have a field {' or '.join(absent)}, got {', '.join(fields)}")
    return found


def _are_good(x: Any, y: Any, t: Any, p: Any) -> bool:
    """Whether there is nothing to check: a microsecond instead of ten, for cameras with packets of few events."""
    return (
        type(x) is type(y) is type(t) is type(p) is np.ndarray
        and x.ndim == 1
        and x.shape == y.shape == t.shape == p.shape
        and x.dtype in _INTEGERS
        and y.dtype in _INTEGERS
        and t.dtype in _TIMES
        and p.dtype in _POLARITIES
    )


def _checked(*columns: Any) -> list[np.ndarray]:
    """The columns as arrays that the compiled class takes."""
    arrays = [_array(name, column) for name, column in zip(_COLUMNS, _columns(*columns), strict=True)]
    for name, array in zip(_COLUMNS, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise ValueError(f"{name} must be [E] like x, {list(arrays[0].shape)}, got {list(array.shape)}")
    return arrays


def _array(name: str, column: Any) -> np.ndarray:
    column = np.asarray(column)
    if column.dtype.kind not in ("iub" if name == "p" else "iu"):
        raise TypeError(f"{name} must hold integers, got {column.dtype}")
    if not column.dtype.isnative:
        raise TypeError(f"{name} must be in native byte order, got {column.dtype}")
    if column.ndim != 1:
        raise ValueError(f"{name} must be [E] with one dimension, got {list(column.shape)}")
    if name == "t" and column.dtype == np.uint64 and column.size and column.max() > np.iinfo(np.int64).max:
        raise ValueError(f"t must be within int64, got {column.max()}; none of the packet was added")
    return column


def _implementation() -> type:
    try:
        return importlib.import_module("evkernels._host").EventAccumulator
    except ImportError:
        return NumpyImages


class NumpyImages:
    """`evkernels._host.EventAccumulator` in NumPy: its definition, and its stand-in where it is not built."""

    def __init__(self, height: int, width: int, polarities: int, times: bool, counts: bool, drop: bool):
        self.shape, self.drop = (polarities, height, width), drop
        self.kept = {"counts": counts, "times": times}
        self.lock = threading.Lock()
        self._clear()

    def push(self, x, y, t, p) -> int:
        x, y, t, p = (np.array(column).astype(np.int64) for column in (x, y, t, p))
        polarities, height, width = self.shape
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height) & (p >= -1) & (p <= 1)
        if not (self.drop or inside.all()):
            return -1
        cell = ((((p > 0) * (polarities - 1)) * height + y) * width + x)[inside]
        with self.lock:
            if self.times is not None:
                np.maximum.at(self.times.reshape(-1), cell, t[inside])
            if self.counts is not None:
                more = np.bincount(cell, minlength=self.counts.size).reshape(self.shape)
                self.counts = np.minimum(self.counts + more, np.iinfo(np.int32).max).astype(np.int32)
            self.events += len(cell)
            self.dropped += len(inside) - len(cell)
        return len(cell)

    def snapshot(self, clear: bool) -> tuple[np.ndarray | None, np.ndarray | None, int, int]:
        with self.lock:
            images = (None if image is None else image.copy() for image in (self.counts, self.times))
            taken = (*images, self.events, self.dropped)
            if clear:
                self._clear()
        return taken

    def _clear(self) -> None:
        self.counts = np.zeros(self.shape, np.int32) if self.kept["counts"] else None
        self.times = np.full(self.shape, NEVER, np.int64) if self.kept["times"] else None
        self.events = self.dropped = 0
