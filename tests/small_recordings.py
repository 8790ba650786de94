"""Four events as a file of every format that `read` knows, and what tests of readers ask of the result."""

import struct
import warnings
import zipfile

import numpy as np
import pytest

from evkernels.events import Events, RecordingError, read

EPOCH = 1_633_953_690_975_950  # microseconds of a real recording
SMALL = Events(
    np.array([0, 3, 2, 3], np.uint16),
    np.array([2, 0, 1, 1], np.uint16),
    np.array([EPOCH, EPOCH + 1, EPOCH + 1, EPOCH + 2_000_000]),
    np.array([1, 0, 1, 0], np.uint8),
    4,
    3,
)


def columns(**changes):
    return {**{name: getattr(SMALL, name) for name in "txyp"}, **changes}


def write_npz(path, **changes):
    np.savez(path, **{name: value for name, value in columns(**changes).items() if value is not None})
    return path


def text(t=SMALL.t, size=""):
    lines = (
        f"{s // 10**6}.{s % 10**6:06d} {x} {y} {p}" for s, x, y, p in zip(t, SMALL.x, SMALL.y, SMALL.p, strict=True)
    )
    return size + "\n".join(lines) + "\n"


def write_text(path, content=None):
    path.write_text(text() if content is None else content)
    return path


def write_zip(path, members=None):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (members or {"events.txt": text()}).items():
            archive.writestr(name, content)
    return path


def write_hdf5(path, group="events", t_offset=None, **changes):
    h5py = pytest.importorskip("h5py", reason="h5py (extra io) is not installed")
    with h5py.File(path, "w") as file:
        for name, value in columns(**changes).items():
            if value is not None:
                file[f"{group}/{name}"] = value
        if t_offset is not None:
            file["t_offset"] = np.int64(t_offset)
    return path


def write_mat(path, **variables):
    io = pytest.importorskip("scipy.io", reason="scipy (extra io) is not installed")
    table = np.stack([SMALL.x, SMALL.y, SMALL.p * 2.0 - 1, SMALL.t], axis=1)
    io.savemat(path, variables or {"events": table, "note": "a string"})
    return path


# EVT2: 32-bit words, kind in the top 4 bits; EVT3: 16-bit words; both little-endian. Written from the format's tables.
def evt2_payload():
    words = []
    for x, y, t, p in zip(SMALL.x, SMALL.y, SMALL.t - EPOCH + (5 << 6), SMALL.p, strict=True):
        words += [8 << 28 | int(t) >> 6, int(p) << 28 | (int(t) & 63) << 22 | int(x) << 11 | int(y)]
    return struct.pack(f"<{len(words)}I", *words)


def evt3_payload():
    words = []
    for x, y, t, p in zip(SMALL.x, SMALL.y, SMALL.t - EPOCH + (5 << 12), SMALL.p, strict=True):
        words += [8 << 12 | int(t) >> 12, 6 << 12 | int(t) & 4095, int(y), 2 << 12 | int(p) << 11 | int(x)]
    return struct.pack(f"<{len(words)}H", *words)


def dat_payload():
    events = zip(SMALL.x, SMALL.y, SMALL.t - EPOCH, SMALL.p, strict=True)
    return bytes([0, 8]) + b"".join(
        struct.pack("<2I", t, int(p) << 28 | int(y) << 14 | int(x)) for x, y, t, p in events
    )


RAW = {
    "evt2.raw": (b"% evt 2.0\n% geometry 4x3\n% end\n", evt2_payload(), 5 << 6),
    "evt3.raw": (b"% format EVT3;height=3;width=4\n% evt 3.0\n% end\n", evt3_payload(), 5 << 12),
    "cd.dat": (b"% Version 2\n% Height 3\n% Width 4\n", dat_payload(), 0),
}


# By ending, where it is not NumPy and the standard library that read.
LIBRARIES = {
    ".raw": "eventcv",
    ".dat": "eventcv",
    ".aedat4": "faery",
    ".h5": "h5py",
    ".hdf5": "h5py",
    ".mat": "scipy.io",
}


def need(*modules):
    for module in modules:
        pytest.importorskip(module, reason=f"{module} (extra io) is not installed")


def assert_small(events, t=SMALL.t, size=(4, 3)):
    assert np.array_equal(events.t, t)
    assert events.t.dtype == np.int64
    for name, dtype in (("x", np.uint16), ("y", np.uint16), ("p", np.uint8)):
        assert np.array_equal(getattr(events, name), getattr(SMALL, name))
        assert getattr(events, name).dtype == dtype
    assert (events.width, events.height) == size


def refused(path, *expected, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RecordingError) as caught:
            read(path, **options)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    for words in expected:
        assert words in message, message
