"""One preprocessed recording: frames in an HDF5 file, times and boxes beside it, in the layout of RVT.

The file is opened for every read and never kept open: that costs 0.3 ms, a twentieth of what reading five frames does,
and makes the objects fit for any process, forked or spawned.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from evkernels.events.optional import require

_FOLDER = "event_representations_v2"
_COLUMNS = ("x", "y", "w", "h", "class_id", "class_confidence")


@dataclass(eq=False)
class PreprocessedRecording:
    """Frames, times and boxes of a recording.

    Args:
        folder: Of the recording, with `event_representations_v2` inside.
        representation: Name of the folder inside that, such as "stacked_histogram_dt=50_nbins=10". None: the only one.
        downsample: Factor by which the frames were made smaller, as their file's name tells; boxes are made smaller
            by it.
        targets: Name of a file in the folder, such as "depth.npy", with a map for each frame, [B, H, W]; NaN is where
            a pixel has none. None: there are none.

    `shape` [C, H, W] and `dtype` are those of a frame. `times` are the ends of the windows in microseconds, int64 [B].
    `labelled` says by frame whether boxes were looked for, bool [B], and `boxes` are float32 [L, 6] of x, y, w, h,
    class and confidence, those of frame k from `first_box[k]` to `first_box[k + 1]`.

    Raises:
        ValueError: if something is missing, or does not fit together; the message names the file.
        ImportError: without h5py and hdf5plugin.
    """

    folder: Path
    representation: str | None = None
    downsample: int = 1
    targets: str | None = None
    shape: tuple[int, int, int] = field(init=False)
    dtype: np.dtype = field(init=False)
    times: np.ndarray = field(init=False, repr=False)
    labelled: np.ndarray = field(init=False, repr=False)
    boxes: np.ndarray = field(init=False, repr=False)
    first_box: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        place = _representation(self.folder / _FOLDER, self.representation)
        self.representation = place.name
        ending = "" if self.downsample == 1 else f"_ds{self.downsample}_nearest"
        self.file = place / f"event_representations{ending}.h5"
        if not self.file.is_file():
            held = ", ".join(sorted(path.name for path in place.glob("*.h5"))) or "no .h5 file"
            raise ValueError(f"{self.file}: expected frames, got {held}: is the recording finished, or downsampled?")
        with self._open() as file:
            self.shape, self.dtype, count = file["data"].shape[1:], file["data"].dtype, len(file["data"])
        self.times = _array(place / "timestamps_us.npy")
        if self.times.shape != (count,):
            raise ValueError(f"{place}: expected a time for each of {count} frames, got {list(self.times.shape)}")
        self._read_boxes(place)
        if self.targets is not None:
            expected, file = (count, *self.shape[1:]), self.folder / self.targets
            if _array(file, "r").shape != expected:
                got = list(_array(file, "r").shape)
                raise ValueError(f"{file}: expected maps [B, H, W] = {list(expected)}, got {got}")

    def __len__(self) -> int:
        """The number of frames."""
        return len(self.times)

    def read(self, begin: int, out: np.ndarray) -> None:
        """Reads the frames begin to begin + len(out) into `out` [n, C, H, W], each of whose frames is contiguous."""
        with self._open() as file:
            for index, frame in enumerate(out):
                file["data"].read_direct(frame, np.s_[begin + index])

    def read_targets(self, begin: int, count: int) -> np.ndarray:
        """The maps of the frames begin to begin + count, [count, H, W]."""
        return _array(self.folder / self.targets, "r")[begin : begin + count]

    def _open(self):
        h5py = require("h5py", "preprocess", "reading preprocessed recordings")
        require("hdf5plugin", "preprocess", "reading preprocessed recordings")
        try:
            return h5py.File(self.file, "r")
        except OSError as error:
            raise ValueError(f"{self.file}: expected an HDF5 file, got: {error}") from error

    def _read_boxes(self, place: Path) -> None:
        index_file, label_file = place / "objframe_idx_2_repr_idx.npy", self.folder / "labels_v2" / "labels.npz"
        counts = np.zeros(len(self) + 1, np.int64)
        self.labelled, self.boxes = np.zeros(len(self), bool), np.zeros((0, len(_COLUMNS)), np.float32)
        if index_file.is_file() and label_file.is_file():
            frames = _array(index_file)
            with np.load(label_file, allow_pickle=False) as archive:
                table, first = archive["labels"], archive["objframe_idx_2_label_idx"]
            times = table["t"][first] if len(first) else np.zeros(0)
            # Other windows, made later, bring labels of their own.
            if len(frames) != len(first) or not np.array_equal(self.times[frames], times):
                raise ValueError(f"{label_file}: expected the boxes of {index_file}, got those of other windows")
            self.labelled[frames] = True
            self.boxes = np.stack([table[name].astype(np.float32) for name in _COLUMNS], axis=1)
            self.boxes[:, :4] /= self.downsample
            counts[frames + 1] = np.diff(np.append(first, len(table)))
        self.first_box = np.cumsum(counts)


def find(
    root: str | Path, representation: str | None = None, downsample: int = 1, targets: str | None = None
) -> list[PreprocessedRecording]:
    """The preprocessed recordings in a folder and all folders below, sorted by path.

    Args:
        root: Such as one of a data set's folders train, val and test.
        representation, downsample, targets: As for `PreprocessedRecording`.

    Raises:
        ValueError: if there are none, or their frames differ in size; as `PreprocessedRecording`.
    """
    root = Path(root)
    folders = sorted(path.parent for path in root.rglob(_FOLDER) if path.is_dir())
    if not folders:
        raise ValueError(f"{root}: expected preprocessed recordings, got no folder {_FOLDER} in it")
    recordings = [PreprocessedRecording(folder, representation, downsample, targets) for folder in folders]
    first = recordings[0]
    for other in recordings:
        if (other.shape, other.dtype, other.representation) != (first.shape, first.dtype, first.representation):
            raise ValueError(f"{root}: expected frames of one kind, got {_kind(first)} and {_kind(other)}")
    return recordings


def _kind(recording: PreprocessedRecording) -> str:
    return f"{recording.representation} {list(recording.shape)} {recording.dtype} in {recording.folder}"


def _representation(folder: Path, name: str | None) -> Path:
    held = sorted(path for path in folder.glob("*") if path.is_dir())
    chosen = [path for path in held if name in (None, path.name)]
    if len(chosen) != 1:
        names = ", ".join(path.name for path in held) or "none"
        raise ValueError(f"{folder}: expected the representation {name or '(the only one)'}, got {names}")
    return chosen[0]


def _array(path: Path, mmap_mode: str | None = None) -> np.ndarray:
    try:
        return np.load(path, mmap_mode, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{path}: expected an array, got: {error}") from error
