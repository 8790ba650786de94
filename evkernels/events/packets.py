"""Recordings in packets of events, so that one of any length is read in bounded memory.

HDF5 files are read in parts. The other formats are decoded whole by their libraries, 13 bytes per event, and cut into
packets without a copy. Times that step back cannot be sorted without holding everything: in HDF5 files they are
raised to the latest time before them, which is RVT's rule for the same files.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .container import Events
from .decoders import Columns, Hdf5Events, RecordingError, open_hdf5
from .readers import check_request, checked, microseconds, read

_PACKET_EVENTS = 2**21  # 27 MB of events


@dataclass
class Recording:
    """A recording that is read in packets.

    `start` is the time of its first event in microseconds, `events` their number, `notes` what is odd about it.
    Iterating yields Events sorted by time, none earlier than one of the packet before, on one sensor.

    Args:
        path: File to read, as `read` takes it.
        sensor: (width, height) in pixels. None: as the file says; where it does not, the smallest sensor that holds all
            events.
        packet_events: Events per packet.

    Raises:
        RecordingError: as `read`; for damage inside an HDF5 file when that part is reached.
        ValueError: if `sensor` is not two positive integers.
    """

    path: Path
    sensor: tuple[int, int] | None = None
    packet_events: int = _PACKET_EVENTS
    width: int = field(init=False)
    height: int = field(init=False)
    events: int = field(init=False)
    start: int = field(init=False)
    notes: list[str] = field(init=False, default_factory=list)
    _whole: Events | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        self.sensor = check_request(self.path, self.sensor)
        if self.path.suffix.lower() in (".h5", ".hdf5"):
            with open_hdf5(self.path) as source:
                self._look_at(source)
            return
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self._whole = read(self.path, self.sensor)
        self.notes += [str(warning.message) for warning in caught if warning.category is UserWarning]
        self.width, self.height, self.events = self._whole.width, self._whole.height, len(self._whole)
        self.start = int(self._whole.t[0])

    def __iter__(self) -> Iterator[Events]:
        return self._hdf5_packets() if self._whole is None else self._whole.windows(count=self.packet_events)

    def _look_at(self, source: Hdf5Events) -> None:
        if len(set(source.lengths.values())) != 1 or -1 in source.lengths.values():
            got = ", ".join(f"{name} [{length}]" for name, length in source.lengths.items())
            raise RecordingError(f"{self.path}: expected x, y, t, p of one length [E], got {got}")
        self.events = source.lengths["t"]
        if self.events == 0:
            raise RecordingError(f"{self.path}: expected events, got none")
        self.start = int(microseconds(self.path, source.read(slice(0, 1))[2])[0])
        sensor = self.sensor or source.sensor
        if sensor is None:
            parts = (source.read(part) for part in self._parts())
            largest = [(int(x.max()), int(y.max())) for x, y, _, _ in parts]
            sensor = tuple(max(sizes) + 1 for sizes in zip(*largest, strict=True))
        self.width, self.height = sensor

    def _hdf5_packets(self) -> Iterator[Events]:
        late, latest = 0, np.iinfo(np.int64).min
        with open_hdf5(self.path) as source:
            for part in self._parts():
                x, y, t, p = source.read(part)
                t = microseconds(self.path, t)
                if t[0] < latest or (t[1:] < t[:-1]).any():
                    raised = np.maximum.accumulate(np.maximum(t, latest))
                    late += int(np.count_nonzero(raised != t))
                    t = raised
                latest = t[-1]
                yield checked(self.path, Columns(x, y, t, p), (self.width, self.height))
        if late:
            self.notes.append(
                f"{self.path}: {late} of {self.events} events are earlier than one before; moved to its time"
            )

    def _parts(self) -> Iterator[slice]:
        return (slice(begin, begin + self.packet_events) for begin in range(0, self.events, self.packet_events))
