"""One recording to one file of representations: the work of a worker, in memory that its length does not change."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from evkernels.events import EventBatch, Recording, RecordingError
from evkernels.preprocess.labels import LABEL_INDEX, LABEL_STRIDE_US, Labels, find_labels, read_labels
from evkernels.preprocess.representations import REPRESENTATIONS, folder
from evkernels.preprocess.settings import Settings
from evkernels.preprocess.windows import TooManyWindows, batches, consecutive
from evkernels.preprocess.writer import RepresentationWriter, is_finished

# Frames made in one call. Larger blocks come as fresh pages from the system every time: 64 MiB take 12 % longer for a
# whole VGA recording, of which the counting itself is then a third instead of a twentieth.
_FRAME_BYTES = 2**24
_LARGEST_FRAME = 2**31 - 1  # What blosc compresses at once.
_LATEST = 2**62  # Microseconds; sums of times stay in int64.


@dataclass
class Result:
    """What became of one recording.

    Args:
        source: The recording.
        outcome: "bad input" and "failed" come with a message of one line.
        events: Events of the recording, 0 if it was not made.
        windows: Windows written.
        seconds: Time it took.
        message: What went wrong.
        notes: What else there is to say.
    """

    source: Path
    outcome: Literal["written", "finished before", "bad input", "failed"] = "written"
    events: int = 0
    windows: int = 0
    seconds: float = 0.0
    message: str = ""
    notes: list[str] = field(default_factory=list)


def convert(
    source: Path,
    sequence: Path,
    settings: Settings,
    overwrite: bool = False,
    advance: Callable[[int, int], None] | None = None,
) -> Result:
    """Makes the representations of a recording.

    Args:
        source: The recording.
        sequence: Folder of its results; the representations go where RVT's loader looks for them inside.
        settings: What to make.
        overwrite: Make it again even if it is there.
        advance: Called with the events read so far and those of the whole recording.

    Returns:
        Result. Bad recordings and files that cannot be written are results, not exceptions, so that others go on.
    """
    begin = time.perf_counter()
    result = Result(source)
    try:
        _convert(result, sequence, settings, overwrite, advance)
    except (RecordingError, TooManyWindows, OSError) as error:
        result = _refused(source, sequence, error)
    return replace(result, seconds=time.perf_counter() - begin)


def settled(source: Path, sequence: Path, settings: Settings, overwrite: bool = False) -> Result | None:
    """What `convert` says of a recording that it would not even open, finished before or refused; None of others."""
    try:
        _, _, _, finished = _plan(source, sequence, settings, overwrite)
    except (RecordingError, OSError) as error:
        return _refused(source, sequence, error)
    return Result(source, "finished before") if finished else None


def _refused(source: Path, sequence: Path, error: Exception) -> Result:
    text = str(error) if isinstance(error, RecordingError) else f"{source}: {error}"
    if isinstance(error, OSError) and error.strerror:
        file = sequence if error.filename is None else Path(error.filename)
        text = f"{source}: {file} cannot be {'read' if file == source else 'written to'}: {error.strerror}"
    outcome = "bad input" if isinstance(error, RecordingError | TooManyWindows) else "failed"
    return Result(source, outcome, message=" ".join(text.split()))


def _plan(source: Path, sequence: Path, settings: Settings, overwrite: bool) -> tuple[Path, dict, Path | None, bool]:
    """The file to make, what it is made of, the file of labels, and whether it is there."""
    if not source.is_file():
        raise RecordingError(f"{source}: expected a recording, got no such file")
    target = sequence / "event_representations_v2" / folder(settings) / settings.file
    label_file = find_labels(source) if settings.labels else None
    sizes = {"source_bytes": source.stat().st_size, "label_bytes": label_file and label_file.stat().st_size}
    record = {**settings.describe(), **sizes, "version": 1}
    return target, record, label_file, not overwrite and is_finished(target, record)


def _convert(result: Result, sequence: Path, settings: Settings, overwrite: bool, advance) -> None:
    target, record, label_file, finished = _plan(result.source, sequence, settings, overwrite)
    if finished:
        result.outcome = "finished before"
        return
    recording = Recording(result.source, settings.sensor)
    height, width = recording.height // settings.downsample, recording.width // settings.downsample
    if min(height, width) < 1:
        raise RecordingError(
            f"{result.source}: expected a sensor of at least {settings.downsample}x{settings.downsample} pixels to "
            f"downsample, got {recording.width}x{recording.height}"
        )
    frames = REPRESENTATIONS[settings.representation].frames(settings, height, width)
    shape, dtype = frames.shape, torch.empty(0, dtype=frames.dtype).numpy().dtype
    frame_bytes = int(np.prod(shape)) * dtype.itemsize
    if frame_bytes > _LARGEST_FRAME:
        raise RecordingError(
            f"{result.source}: expected frames of less than 2 GiB, got {frame_bytes:,} bytes for {list(shape)}: "
            "damaged coordinates, or too many bins"
        )
    most = max(1, _FRAME_BYTES // frame_bytes)
    labels = _labels(label_file, recording, settings)
    given, ends = None if labels is None else labels.ends, []
    with RepresentationWriter(target, shape, dtype, record) as writer:
        packets = _watched(recording, advance)
        for batch, times in _windows(packets, settings, most, given):
            writer.append(frames.make(_downsampled(batch, settings.downsample, height, width), times).numpy())
            ends.append(times)
        beside = {target.parent / LABEL_INDEX: None} if labels is None else labels.files(sequence, target.parent)
        writer.commit({target.parent / "timestamps_us.npy": np.concatenate(ends), **beside})
    result.events, result.windows = recording.events, sum(map(len, ends))
    result.notes += recording.notes


def _windows(packets, settings: Settings, most: int, ends: np.ndarray | None):
    if ends is None and settings.stride_us is None:
        return consecutive(packets, settings.window_events, most)
    return batches(packets, settings.window, settings.stride_us, most, ends)


def _labels(path: Path | None, recording: Recording, settings: Settings) -> Labels | None:
    if path is None:
        return None
    stride = settings.stride_us or LABEL_STRIDE_US
    first = stride if settings.window_events is not None else settings.window_us
    labels = read_labels(path, recording.width, recording.height, recording.start, first, stride)
    if labels is None:
        recording.notes.append(f"{path}: no box after the recording's first window; windows are cut without labels")
    return labels


def _watched(recording: Recording, advance):
    """The packets; `advance` hears of each after it was used."""
    done = 0
    for packet in recording:
        if max(abs(int(packet.t[0])), abs(int(packet.t[-1]))) > _LATEST:
            raise RecordingError(f"{recording.path}: expected times within 2**62 microseconds, got {packet.t[-1]}")
        yield packet
        done += len(packet)
        if advance is not None:
            advance(done, recording.events)


def _downsampled(batch: EventBatch, factor: int, height: int, width: int) -> EventBatch:
    """Events of the pixels that nearest-exact interpolation of the frame keeps; others leave the sensor.

    Counting only what is kept gives the frame that downsampling the whole one gives, as times of all events still
    divide the window, and writes 1 / factor**2 of the memory.
    """
    if factor == 1:
        return batch
    x, y = (_kept(column, factor, size) for column, size in ((batch.x, width), (batch.y, height)))
    return replace(batch, x=x, y=y, width=width, height=height)


def _kept(column: torch.Tensor, factor: int, size: int) -> torch.Tensor:
    small = column.div(factor, rounding_mode="floor")
    return torch.where((column % factor == factor // 2) & (small < size), small, -1)
