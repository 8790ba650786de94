"""Decoders of recordings: a file in, its columns out, or RecordingError. readers.py judges the values.

Libraries do the decoding. Compared on recordings of each format against independently decoded arrays:
eventcv (Apache-2.0) is exact on EVT2, EVT3 and DAT, and refuses files of another kind. It skips damaged AEDAT4 packets
without a word, and drops events outside a sensor it is told, so it is told a sensor that nothing falls out of.
faery (LGPL-3.0) is exact on AEDAT4 and refuses damaged or missing packets; as text that is not UTF-8 in a header makes
it abort the process, it runs in one of its own (0.2 s a file). It holds EVT3 times that step back (1,455 of
219,596 events, by up to 11 us) and does not know DAT files whose event type is 0.
expelliarmus 1.1.12 adds 4,096 us to EVT3 times at every step back, so it is not used.
"""

from __future__ import annotations

import io
import itertools
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .optional import require

_NAMES = ("x", "y", "t", "p")
_LARGEST_SENSOR = (65535, 65535)
_FAERY = """
import io, sys, faery, numpy
stream = faery.events_stream_from_file(sys.argv[1])
answer = io.BytesIO()
numpy.savez(answer, events=stream.to_array(), sensor=stream.dimensions())
sys.stdout.buffer.write(answer.getvalue())
"""


class RecordingError(ValueError):
    """A recording that cannot be used: one line with the file, what was expected and what came."""


class Columns(NamedTuple):
    """Columns [E] as the file holds them; t in integer microseconds or float seconds. Sensor: what the file states."""

    x: np.ndarray
    y: np.ndarray
    t: np.ndarray
    p: np.ndarray
    sensor: tuple[int, int] | None = None


@contextmanager
def _decoding(path: Path, expected: str) -> Iterator[None]:
    """Turn whatever a decoding library raises into RecordingError."""
    try:
        yield
    except RecordingError:
        raise
    except ImportError as error:
        raise RecordingError(f"{path}: {error}") from error
    # Decoders raise what they like, and a panic of one written in Rust is a BaseException that no module exports.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise RecordingError(f"{path}: expected {expected}, got: {reason}") from error


def _size(path: Path, width: object, height: object) -> tuple[int, int] | None:
    """The sensor a file states; None if it does not."""
    if width is None and height is None:
        return None
    sizes = [np.asarray(0 if size is None else size) for size in (width, height)]
    if not all(size.size == 1 and size.dtype.kind in "iu" and size.item() > 0 for size in sizes):
        raise RecordingError(f"{path}: expected width and height as positive integers, got {width} and {height}")
    return sizes[0].item(), sizes[1].item()


def _read_npz(path: Path) -> Columns:
    with _decoding(path, "an .npz archive of t, x, y, p without pickled objects"):
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise RecordingError(f"{path}: expected an .npz archive of t, x, y, p, got a single array")
        with archive:
            _require_names(path, archive)
            sensor = _size(path, *(archive.get(name, None) for name in ("width", "height")))
            return Columns(*(archive[name] for name in _NAMES), sensor)


def _read_txt(path: Path) -> Columns:
    with _decoding(path, "lines `t x y p`"), open(path, encoding="ascii") as lines:
        return _read_lines(path, lines)


def _read_zip(path: Path) -> Columns:
    with _decoding(path, "a zip archive with one .txt of lines `t x y p`"), zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".txt")]
        if len(names) > 1:
            names = [name for name in names if Path(name).name == "events.txt"]
        if len(names) != 1:
            held = ", ".join(archive.namelist()[:5]) or "nothing"
            raise RecordingError(f"{path}: expected one .txt, or one events.txt among several, got {held}")
        with archive.open(names[0]) as file:
            return _read_lines(path, io.TextIOWrapper(file, encoding="ascii"))


def _read_lines(path: Path, lines: Iterator[str]) -> Columns:
    lines = (line for line in lines if line.strip() and not line.lstrip().startswith("#"))
    first, sensor = next(lines, ""), None
    if len(first.split()) == 2:
        sensor, first = _size(path, *map(int, first.split())), next(lines, "")
    if not first:
        raise RecordingError(f"{path}: expected events, got none")
    table = np.loadtxt(itertools.chain([first], lines), dtype=np.float64, ndmin=2)
    if table.shape[1] != 4:
        raise RecordingError(f"{path}: expected 4 columns t x y p, got {table.shape[1]}")
    t, x, y, p = table.T
    return Columns(x, y, t, p, sensor)


class Hdf5Events(NamedTuple):
    """The events of an open HDF5 file: `read` returns x, y, t, p of a range of them."""

    read: Callable[[slice], tuple[np.ndarray, ...]]
    lengths: dict[str, int]
    sensor: tuple[int, int] | None


@contextmanager
def open_hdf5(path: Path) -> Iterator[Hdf5Events]:
    """Open a file for reading in parts; t comes with the file's offset."""
    with _decoding(path, "an HDF5 file with events/x, y, p, t"):
        h5py = require("h5py", "io", "reading HDF5")
        with h5py.File(path, "r") as file:
            group = next((file[name] for name in ("events", "CD/events") if name in file), None)
            if group is None:
                raise RecordingError(f"{path}: expected a group events or CD/events, got {', '.join(file) or 'none'}")
            names = group.keys() if isinstance(group, h5py.Group) else group.dtype.names or ()
            _require_names(path, names)
            stated = ((group[name][()] if name in names else None) for name in ("width", "height"))
            sensor = _size(path, *stated) if isinstance(group, h5py.Group) else None
            if _compressed_by_plugin(h5py, group):
                require("hdf5plugin", "io", "reading this file's compression")
            offset = int(file["t_offset"][()]) if "t_offset" in file else None

            def read(part: slice) -> tuple[np.ndarray, ...]:
                table = group if isinstance(group, h5py.Group) else group[part]
                x, y, t, p = (table[name][part] if table is group else table[name] for name in _NAMES)
                if t.dtype.kind not in "iu":
                    raise RecordingError(f"{path}: expected t in integer microseconds, got {t.dtype}")
                return x, y, t if offset is None else t.astype(np.int64) + offset, p

            lengths = {name: (group[name] if isinstance(group, h5py.Group) else group).shape for name in _NAMES}
            yield Hdf5Events(
                read, {name: shape[0] if len(shape) == 1 else -1 for name, shape in lengths.items()}, sensor
            )


def _read_hdf5(path: Path) -> Columns:
    with open_hdf5(path) as events:
        return Columns(*events.read(slice(None)), events.sensor)


def _compressed_by_plugin(h5py, group) -> bool:
    datasets = [group[name] for name in _NAMES] if isinstance(group, h5py.Group) else [group]
    for dataset in datasets:
        plist = dataset.id.get_create_plist()
        filters = (plist.get_filter(index)[0] for index in range(plist.get_nfilters()))
        if any(not h5py.h5z.filter_avail(code) for code in filters):
            return True
    return False


def _read_prophesee(path: Path) -> Columns:
    expected = "a Prophesee EVT2 or EVT3 recording" if path.suffix.lower() == ".raw" else "a Prophesee DAT recording"
    with _decoding(path, expected):
        eventcv = require("eventcv", "io", f"reading {path.suffix}")
        header, size = _header(path)
        payload = path.stat().st_size - size
        # Two bytes of a DAT file's payload state the kind and the size of its 8-byte events.
        word, extra = (8, 2) if path.suffix.lower() == ".dat" else (2, 0) if _is_evt3(header) else (4, 0)
        if payload < extra or (payload - extra) % word:
            raise RecordingError(f"{path}: expected whole words of {word} bytes, got {payload} bytes: cut short?")
        table = eventcv.load(str(path), sensor_size=_LARGEST_SENSOR).numpy()
        return Columns(*table.T, _size_in_header(path, header))


def _header(path: Path) -> tuple[str, int]:
    """The lines of text that begin with %, and their length in bytes."""
    lines, size = [], 0
    with open(path, "rb") as file:
        for line in file:
            text = line.decode("ascii", "replace")
            # Binary data may begin with the byte of a percent sign.
            if not text.startswith("%") or not text.strip().isprintable() or "\ufffd" in text:
                break
            lines.append(text.strip())
            size += len(line)
            if lines[-1].lower() == "% end":
                break
    return "\n".join(lines), size


def _is_evt3(header: str) -> bool:
    return re.search(r"evt 3|EVT3", header) is not None


def _size_in_header(path: Path, header: str) -> tuple[int, int] | None:
    geometry = re.search(r"geometry\s+(\d+)x(\d+)", header, re.IGNORECASE)
    if geometry:
        return _size(path, int(geometry[1]), int(geometry[2]))
    sizes = (re.search(rf"\b{name}[ =](\d+)", header, re.IGNORECASE) for name in ("width", "height"))
    return _size(path, *(int(size[1]) if size else None for size in sizes))


def _read_aedat4(path: Path) -> Columns:
    with _decoding(path, "an AEDAT4 recording with whole packets"):
        require("faery", "io", "reading .aedat4")
        done = subprocess.run([sys.executable, "-c", _FAERY, str(path.absolute())], capture_output=True, check=False)
        if done.returncode:
            lines = done.stderr.decode(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "no message")
            raise RuntimeError(last if done.returncode > 0 else f"the decoder died of signal {-done.returncode}")
        with np.load(io.BytesIO(done.stdout), allow_pickle=False) as answer:
            events, sensor = answer["events"], answer["sensor"]
        return Columns(events["x"], events["y"], events["t"], events["on"], tuple(sensor.tolist()))


def _read_mat(path: Path) -> Columns:
    with _decoding(path, "a MATLAB file before 7.3 with one [E, 4] matrix x, y, p, t"):
        variables = require("scipy.io", "io", "reading .mat").loadmat(path)
        tables = [value for name, value in variables.items() if not name.startswith("__") and value.shape[1:] == (4,)]
        if len(tables) != 1:
            raise RecordingError(f"{path}: expected one [E, 4] matrix x, y, p, t, got {len(tables)}")
        x, y, p, t = tables[0].T
        microseconds = t.astype(np.int64)
        if not np.array_equal(microseconds, t):
            raise RecordingError(f"{path}: expected t in whole microseconds, got fractions")
        return Columns(x, y, microseconds, p)


def _require_names(path: Path, names: Iterable[str]) -> None:
    missing = [name for name in _NAMES if name not in names]
    if missing:
        raise RecordingError(f"{path}: expected x, y, t, p, got no {', '.join(missing)} among {', '.join(names)}")


DECODERS = {
    ".npz": _read_npz,
    ".txt": _read_txt,
    ".zip": _read_zip,
    ".raw": _read_prophesee,
    ".dat": _read_prophesee,
    ".aedat4": _read_aedat4,
    ".h5": _read_hdf5,
    ".hdf5": _read_hdf5,
    ".mat": _read_mat,
}
