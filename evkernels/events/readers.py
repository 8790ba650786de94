"""Recordings from files: one function, one error class, and one set of checks after the decoder of any format."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from .container import Events
from .decoders import DECODERS, Columns, RecordingError

_LATEST_SECONDS = 1e11  # 3,000 years: beyond, a column of seconds can only hold other units.


def read(path: str | Path, sensor: tuple[int, int] | None = None) -> Events:
    """Read a recording; the file name's ending chooses the format.

    =================  ================================================================================================
    .npz               arrays t, x, y, p; t integer microseconds or float seconds; width and height optional
    .txt, .zip         lines `t x y p`, t in seconds; first line `width height` optional; .zip holds one such .txt, or
                       several of which one is called events.txt
    .raw               Prophesee EVT2, EVT3 (extra `io`)
    .dat               Prophesee DAT (extra `io`)
    .aedat4            iniVation AEDAT4, the first event stream (extra `io`)
    .h5, .hdf5         group `events` or `CD/events` with x, y, p, t as of RVT, DSEC and Prophesee; t integer
                       microseconds, to which the root's `t_offset` is added; width and height optional (extra `io`)
    .mat               MATLAB before 7.3 with one [E, 4] matrix x, y, p, t in microseconds (extra `io`)
    =================  ================================================================================================

    Args:
        path: File to read.
        sensor: (width, height) in pixels. None: as the file says; where it does not, the smallest sensor that holds all
            events, which may be smaller than the camera's.

    Returns:
        Events with x, y uint16, sorted by time. Polarities -1, 1 and False, True come as 0, 1; float seconds are
        rounded to the nearest microsecond. Times out of order are sorted, equal ones in file order, with a UserWarning
        that counts them.

    Raises:
        RecordingError: if the file is missing, empty, damaged, of an unknown format, not decodable with what is
            installed, or holds values no sensor gives, or events outside the sensor. EVT and DAT files carry no length:
            one cut between two events reads as a shorter recording.
        ValueError: if `sensor` is not two positive integers.
    """
    path = Path(path)
    sensor = check_request(path, sensor)
    return checked(path, DECODERS[path.suffix.lower()](path), sensor)


def check_request(path: Path, sensor: tuple[int, int] | None) -> tuple[int, int] | None:
    """Whether there is a file of a known format; returns `sensor` as a tuple."""
    if sensor is not None:
        sensor = tuple(sensor)
        if len(sensor) != 2 or not all(isinstance(size, (int, np.integer)) and size > 0 for size in sensor):
            raise ValueError(f"sensor must be two positive integers (width, height), got {sensor}")
    if not path.is_file():
        raise RecordingError(f"{path}: expected a recording, got {'a folder' if path.is_dir() else 'no such file'}")
    if path.suffix.lower() not in DECODERS:
        raise RecordingError(f"{path}: expected one of {', '.join(DECODERS)}, got {path.suffix or 'no ending'!r}")
    if path.stat().st_size == 0:
        raise RecordingError(f"{path}: expected a recording, got an empty file")
    return sensor


def checked(path: Path, columns: Columns, sensor: tuple[int, int] | None) -> Events:
    """The events of decoded columns, judged and sorted as `read` says."""
    lengths = {name: np.shape(getattr(columns, name)) for name in ("x", "y", "t", "p")}
    if len(set(lengths.values())) != 1 or len(lengths["t"]) != 1:
        got = ", ".join(f"{name} {list(shape)}" for name, shape in lengths.items())
        raise RecordingError(f"{path}: expected x, y, t, p of one length [E], got {got}")
    if len(columns.t) == 0:
        raise RecordingError(f"{path}: expected events, got none")
    x, y = (_coordinates(path, name, getattr(columns, name)) for name in ("x", "y"))
    t, p = microseconds(path, columns.t), _polarity(path, columns.p)
    width, height = sensor or columns.sensor or (int(x.max()) + 1, int(y.max()) + 1)
    outside = int(np.count_nonzero((x >= width) | (y >= height)))
    if outside:
        raise RecordingError(
            f"{path}: expected events inside the sensor {width}x{height}, got {outside} of {len(t)} outside, "
            f"largest x {int(x.max())}, largest y {int(y.max())}"
        )
    events = Events(x, y, t, p, width, height)
    if not events.is_sorted:
        late = int(np.count_nonzero(t[1:] < t[:-1]))
        warnings.warn(f"{path}: {late} of {len(t)} events are earlier than the one before; sorted", stacklevel=3)
    return events.sorted()


def _coordinates(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    values = _whole(path, name, values)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65534:
        wrong = int(np.count_nonzero((values < 0) | (values > 65534)))
        raise RecordingError(
            f"{path}: expected {name} in 0..65534, got {low}..{high}: {wrong} of {len(values)} outside"
        )
    return values.astype(np.uint16)


def _polarity(path: Path, values: np.ndarray) -> np.ndarray:
    if values.dtype != np.bool_:
        values = _whole(path, "p", values)
        if values.dtype.kind == "u" and int(values.max()) <= 1:
            return values.astype(np.uint8)
        kinds = np.unique(values)
        if not (np.isin(kinds, (0, 1)).all() or np.isin(kinds, (-1, 1)).all()):
            raise RecordingError(f"{path}: expected p in {{0, 1}} or {{-1, 1}}, got {', '.join(map(str, kinds[:5]))}")
    return (values > 0).astype(np.uint8)


def microseconds(path: Path, values: np.ndarray) -> np.ndarray:
    """Times as int64 microseconds."""
    if values.dtype.kind == "f":
        if not np.all(np.abs(values) < _LATEST_SECONDS):
            raise RecordingError(f"{path}: expected t in finite seconds below 1e11, got {values.min()}..{values.max()}")
        return np.rint(values.astype(np.float64) * 1e6).astype(np.int64)
    values = _whole(path, "t", values)
    if int(values.max()) > np.iinfo(np.int64).max:
        raise RecordingError(f"{path}: expected t in int64 microseconds, got up to {int(values.max())}")
    return values.astype(np.int64)


def _whole(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "f":
        fractional = ~np.isfinite(values) | (values != np.rint(values))
        if fractional.any():
            raise RecordingError(
                f"{path}: expected {name} in whole numbers, got {int(np.count_nonzero(fractional))} of {len(values)} "
                f"that are not, the first {values[np.argmax(fractional)]}"
            )
    elif values.dtype.kind not in "iu":
        raise RecordingError(f"{path}: expected {name} in numbers, got {values.dtype}")
    return values
