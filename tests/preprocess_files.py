"""Recordings to preprocess as files, and what is in the files that come of them."""

import subprocess
import sys

import numpy as np
import pytest

from evkernels import ops
from evkernels.events import Events

h5py = pytest.importorskip("h5py", reason="h5py is not installed")
pytest.importorskip("hdf5plugin", reason="hdf5plugin is not installed")
pytest.importorskip("rich", reason="rich is not installed")

EPOCH = 1_633_953_690_975_950
FOLDER = "event_representations_v2/stacked_histogram_dt=50_nbins=10"
COLUMNS = ("x", "y", "t", "p")


def events(t, width=8, height=6, seed=0):
    rng = np.random.default_rng(seed)
    x, y = (rng.integers(0, size, len(t)).astype(np.uint16) for size in (width, height))
    return Events(x, y, np.asarray(t, np.int64), rng.integers(0, 2, len(t), dtype=np.uint8), width, height)


def random_events(count, duration, start=EPOCH, **sizes):
    return events(start + np.sort(np.random.default_rng(1).integers(0, duration, count)), **sizes)


def save_npz(path, e):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{name: getattr(e, name) for name in COLUMNS}, width=e.width, height=e.height)
    return path


def save_h5(path, e, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name in COLUMNS:
            file[f"events/{name}"] = getattr(e, name)
        file["events/width"], file["events/height"] = e.width, e.height
        for name, value in more.items():
            file[name] = value
    return path


def frames(sequence, folder=FOLDER, file="event_representations.h5"):
    """Frames and end times, read in a process that knows nothing of this package, as a data loader does."""
    script = (
        "import sys, h5py, hdf5plugin, numpy as np\n"
        "file = h5py.File(sys.argv[1], 'r')\n"
        "assert file['data'].chunks == (1, *file['data'].shape[1:])\n"
        "codes = [file['data'].id.get_create_plist().get_filter(0)[0]]\n"
        "assert codes == [32001], codes\n"
        "assert not any(name.startswith('evkernels') for name in sys.modules)\n"
        "np.save(sys.argv[2], file['data'][:])\n"
    )
    copy = sequence / "read.npy"
    subprocess.run([sys.executable, "-I", "-c", script, sequence / folder / file, copy], check=True)
    data = np.load(copy)
    copy.unlink()
    return data, np.load(sequence / folder / "timestamps_us.npy")


def expected(e, ends, window=50_000, bins=10, cutoff=255):
    """One call of the op per window of RVT's kind: both borders belong to it."""
    result = []
    for end in ends.tolist():
        x, y, t, p = e.slice_time(end - window, end + 1).tensors()
        sizes = dict(bins=bins, height=e.height, width=e.width, count_cutoff=cutoff)
        result.append(ops.event_histogram(x, y, t, p, **sizes).numpy())
    return np.stack(result)


def truncated(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path
