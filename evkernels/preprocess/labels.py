"""Bounding boxes beside a recording, in the form and at the windows that RVT's data loader expects.

The loader finds the boxes of a window by its index, so windows must end where boxes are. Which boxes to train on is
left to the user: only those are dropped that the loader refuses, because nothing of them is inside the sensor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evkernels.events import RecordingError

LABEL_INDEX = "objframe_idx_2_repr_idx.npy"
LABEL_STRIDE_US = 50_000  # RVT's, where windows are counted in events and no stride is given.
_FIELDS = ("t", "x", "y", "w", "h", "class_id", "class_confidence")
_JITTER = 2_000  # Microseconds by which the published labels miss their period.


@dataclass(frozen=True)
class Labels:
    """Boxes of a recording.

    Args:
        boxes: Structured [L], sorted by time, inside the sensor.
        times: Microseconds of the frames that have boxes, int64 [F].
        ends: Ends of the windows, int64 [B]; every frame's time is among them.
    """

    boxes: np.ndarray
    times: np.ndarray
    ends: np.ndarray

    def files(self, sequence: Path, folder: Path) -> dict[Path, np.ndarray | dict[str, np.ndarray]]:
        """What the loader reads beside the representations."""
        first = np.searchsorted(self.boxes["t"], self.times)
        return {
            sequence / "labels_v2" / "labels.npz": {"labels": self.boxes, "objframe_idx_2_label_idx": first},
            sequence / "labels_v2" / "timestamps_us.npy": self.times,
            folder / LABEL_INDEX: np.searchsorted(self.ends, self.times),
        }


def find_labels(recording: Path) -> Path | None:
    """The file `<name>_bbox.npy` beside `<name>_td.dat.h5`, `<name>_td.h5` or `<name>` with any ending."""
    name = re.sub(r"_td(\.dat)?$", "", recording.stem)
    path = recording.with_name(f"{name}_bbox.npy")
    return path if path.is_file() else None


def read_labels(path: Path, width: int, height: int, first_time: int, window_us: int, stride_us: int) -> Labels | None:
    """Boxes, and windows that end with them.

    The first frame is that of the first box whose window does not begin before the recording. Of the later ones those
    are taken that follow the frame before at a whole number of strides, give or take 2 ms; the windows between divide
    the time between them evenly.

    Args:
        path: File of a structured array with fields t (or ts) in microseconds, x, y, w, h in pixels, class_id and
            class_confidence.
        width, height: Sensor size, to which boxes are clipped.
        first_time: Of the recording.
        window_us: Length of a window, or of the first one where windows are counted in events.
        stride_us: From one end to the next.

    Returns:
        None if no box is left.

    Raises:
        RecordingError: if the file does not hold that.
    """
    boxes = _clipped(_load(path), width, height)
    boxes = boxes[boxes["t"] >= first_time + window_us]
    if not len(boxes):
        return None
    times = np.unique(boxes["t"]).tolist()
    frames, ends = times[:1], list(range(times[0], first_time + window_us - 1, -stride_us))[::-1]
    for time in times[1:]:
        steps = round((time - frames[-1]) / stride_us)
        if steps > 0 and abs(time - frames[-1] - steps * stride_us) <= _JITTER:
            ends += [frames[-1] + (time - frames[-1]) * step // steps for step in range(1, steps + 1)]
            frames.append(time)
    frames = np.array(frames, np.int64)
    return Labels(boxes[np.isin(boxes["t"], frames)], frames, np.array(ends, np.int64))


def _load(path: Path) -> np.ndarray:
    try:
        boxes = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise RecordingError(f"{path}: expected an .npy file of boxes, got: {error}") from error
    names = ["t" if name == "ts" else name for name in boxes.dtype.names or ()]
    missing = [name for name in _FIELDS if name not in names]
    if missing or boxes.ndim != 1:
        got = f"no {', '.join(missing)}" if missing else f"shape {list(boxes.shape)}"
        raise RecordingError(f"{path}: expected boxes [L] with fields {', '.join(_FIELDS)}, got {got}")
    kinds = dict(zip(names, (boxes.dtype[index] for index in range(len(names))), strict=True))
    if kinds["t"].kind not in "iu":
        raise RecordingError(f"{path}: expected t in integer microseconds, got {kinds['t']}")
    result = np.empty(len(boxes), list({**kinds, "t": np.dtype(np.int64)}.items()))
    for new, old in zip(names, boxes.dtype.names, strict=True):
        result[new] = boxes[old]
    for name in ("x", "y", "w", "h"):
        if not np.isfinite(result[name]).all():
            raise RecordingError(
                f"{path}: expected finite {name}, got {int((~np.isfinite(result[name])).sum())} others"
            )
    return result[np.argsort(result["t"], kind="stable")]


def _clipped(boxes: np.ndarray, width: int, height: int) -> np.ndarray:
    boxes = boxes.copy()
    for begin, extent, size in (("x", "w", width), ("y", "h", height)):
        low = np.clip(boxes[begin], 0, size - 1)
        boxes[extent] = np.clip(boxes[begin] + boxes[extent], 0, size - 1) - low
        boxes[begin] = low
    return boxes[(boxes["w"] > 0) & (boxes["h"] > 0)]
