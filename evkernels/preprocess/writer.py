"""The file that RVT's data loader reads, written so that a half-written one is never taken for whole.

Frames go to a name of their own, which becomes the final one in a single step after everything is on the disk. What
a killed run leaves under that name is overwritten by the next. The file says in an attribute what it was made of and
how, so that a rerun with other settings does not take it for its own.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np

from evkernels.events.optional import require

try:
    import fcntl
except ImportError:
    fcntl = None

DATASET = "data"
_ATTRIBUTE = "evkernels"


class OutputError(OSError):
    """What is there cannot be used and is not overwritten unasked; one line with the file."""


def libraries():
    """h5py, and hdf5plugin, which gives it blosc."""
    h5py = require("h5py", "preprocess", "preprocessing")
    return h5py, require("hdf5plugin", "preprocess", "preprocessing")


class RepresentationWriter:
    """Writes frames [C, H, W] of one recording, appended batch by batch.

    Args:
        path: The file to make.
        shape: Of a frame.
        dtype: Of a frame.
        record: What the file is made of, for `is_finished`.

    Leaving the context without `commit` removes what was written.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype, record: dict):
        h5py, hdf5plugin = libraries()
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.disk = _Disk(self.partial)
        self.file = h5py.File(self.disk, "w")
        self.file.attrs[_ATTRIBUTE] = json.dumps(record, sort_keys=True)
        # A chunk per frame, as loaders read runs of frames; byte shuffle and zstd 1 as in the published data sets.
        compression = hdf5plugin.Blosc(cname="zstd", clevel=1, shuffle=hdf5plugin.Blosc.SHUFFLE)
        self.data = self.file.create_dataset(
            DATASET, (0, *shape), dtype, chunks=(1, *shape), maxshape=(None, *shape), **compression
        )

    def append(self, frames: np.ndarray) -> None:
        begin = len(self.data)
        self.data.resize(begin + len(frames), axis=0)
        self.data[begin:] = frames
        self.disk.check()

    def commit(self, beside: dict[Path, np.ndarray | dict[str, np.ndarray] | None]) -> None:
        """Makes the file whole under its final name, after the .npy and .npz files that belong to it.

        Args:
            beside: Arrays by file; a file with None is removed.
        """
        self.file.close()
        self.disk.check()
        _to_disk(self.partial)
        # Without the file of an older run, a kill from here on leaves no mixture of the two.
        self.path.unlink(missing_ok=True)
        for path, arrays in beside.items():
            if arrays is None:
                path.unlink(missing_ok=True)
            else:
                _save(path, arrays)
        self.partial.replace(self.path)
        self.disk.file.close()
        _to_disk(self.path.parent)

    def __enter__(self) -> RepresentationWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if not self.disk.file.closed:
            # Before the lock goes: afterwards the name may be another run's.
            self.partial.unlink(missing_ok=True)
            self.disk.file.close()


class _Disk:
    """The file below h5py, which keeps errors of writing from the HDF5 library.

    HDF5 cannot close a file that it failed to write, and crashes the process when it tries again at the end. So after
    a failed write, a full disk for example, it is told that all went well, and `check` raises the error.
    """

    def __init__(self, path: Path):
        self.path, self.error = path, None
        self.file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)
        try:
            _lock(self.file, path)
        except OSError:
            self.file.close()
            raise
        self.file.truncate(0)
        # What h5py asks of a file; `read` makes it one.
        self.seek, self.tell, self.read, self.readinto = (
            getattr(self.file, name) for name in ("seek", "tell", "read", "readinto")
        )

    def write(self, data) -> int:
        size, written = len(data), 0
        while written < size and self.error is None:
            try:
                written += self.file.write(memoryview(data)[written:])
            except OSError as error:
                self.error = error
        return size

    def truncate(self, size: int) -> int:
        return self.file.truncate(size) if self.error is None else size

    def flush(self) -> None:
        """Nothing to do: writes are not buffered."""

    def check(self) -> None:
        if self.error is not None:
            raise self.error


def _lock(file, path: Path) -> None:
    """Keeps a second run from writing the same file; the lock goes with the process."""
    # Windows has no such locks, and lets nobody replace a file that is open.
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OutputError(f"{path}: another run is writing it") from error
    # The run that held the lock may have renamed the file after it was opened here.
    if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
        raise OutputError(f"{path}: another run has just finished it")


def is_finished(path: Path, record: dict) -> bool:
    """Whether the file is there and made of `record`.

    Raises:
        OutputError: if it is there and made of something else.
    """
    if not path.exists():
        return False
    h5py, _ = libraries()
    try:
        with h5py.File(path, "r") as file:
            found = json.loads(file.attrs[_ATTRIBUTE])
    except (OSError, KeyError, ValueError) as error:
        raise OutputError(f"{path}: is there and not of this program; --overwrite replaces it") from error
    expected = json.loads(json.dumps(record))
    if found != expected:
        names = [name for name in expected if found.get(name) != expected[name]] or ["version"]
        made = ", ".join(f"{name} {found.get(name)} instead of {expected.get(name)}" for name in names)
        raise OutputError(f"{path}: is there and was made with {made}; --overwrite replaces it")
    return True


def _save(path: Path, arrays: np.ndarray | dict[str, np.ndarray]) -> None:
    """A file of arrays that is there as a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            if isinstance(arrays, dict):
                np.savez(file, **arrays)
            else:
                np.save(file, arrays)
        _to_disk(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    # Windows opens no folders.
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
