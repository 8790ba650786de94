"""`python -m evkernels preview`: a recording, or what `preprocess` made of it, as a short animation to look at."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from evkernels import arguments

from .container import Events
from .decoders import RecordingError, _decoding
from .draw import event_frame, representation_frame, save_animation
from .optional import require
from .readers import read
from .transforms import downsample, drop_pixels, flip_horizontal, hot_pixels


def preview(events: Events, frames: int = 40, width: int = 320) -> Iterator[np.ndarray]:
    """Pictures of consecutive windows of equal length that together cover a recording.

    Args:
        events: Events in any order.
        frames: How many pictures.
        width: Largest width of a picture; the sensor is downsampled by a whole number to fit.

    Yields:
        uint8 [H, W, 3], as `event_frame` draws them.

    Raises:
        ValueError: for no events, or if a number is smaller than 1.
    """
    for name, value in (("events", len(events)), ("frames", frames), ("width", width)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    small = downsample(events.sorted(), -(-events.width // width))
    length = -(-(events.duration + 1) // frames)
    begin = int(small.t[0])
    for index in range(frames):
        yield event_frame(small.slice_time(begin + index * length, begin + (index + 1) * length))


def preview_representations(path: Path, frames: int = 40, width: int = 320) -> Iterator[np.ndarray]:
    """Pictures of frames that `preprocess` wrote, spread evenly over the recording.

    Args:
        path: HDF5 file with a dataset data [B, C, H, W].
        frames: How many pictures at most.
        width: Largest width of a picture; pixels are added up in squares to fit.

    Yields:
        uint8 [H, W, 3], as `representation_frame` draws them.

    Raises:
        RecordingError: if the file holds no frames, or cannot be read.
    """
    with _decoding(path, "an HDF5 file with frames as dataset data"):
        h5py = require("h5py", "preprocess", "preview")
        require("hdf5plugin", "preprocess", "preview")
        with h5py.File(path, "r") as file:
            data = file["data"]
            if data.ndim != 4 or min(data.shape) < 1:
                raise RecordingError(f"{path}: expected data [B, C, H, W], got {list(data.shape)}")
            step = -(-data.shape[3] // width)
            for index in np.unique(np.linspace(0, len(data) - 1, frames).astype(int)):
                yield representation_frame(_in_squares(data[index], step))


def _in_squares(frame: np.ndarray, step: int) -> np.ndarray:
    """Sums of step x step pixels; the last rows and columns are left out where they do not make a square."""
    channels, height, width = frame.shape[0], frame.shape[1] // step, frame.shape[2] // step
    whole = frame[:, : height * step, : width * step].astype(np.float64)
    return whole.reshape(channels, height, step, width, step).sum(axis=(2, 4))


def _is_preprocessed(path: Path) -> bool:
    return path.name.startswith("event_representations") and path.suffix == ".h5"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `run` to a parser."""
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="a recording, or an event_representations.h5 of preprocess")
    add("out", type=Path, metavar="OUT", help=".gif, or .png or .apng for an animated PNG")
    add("--frames", type=arguments.positive, default=40, metavar="N", help="default %(default)s")
    add("--rate", type=arguments.positive, default=20, metavar="N", help="frames per second, default %(default)s")
    add("--width", type=arguments.positive, default=320, metavar="N", help="largest width, default %(default)s")
    add("--flip", action="store_true", help="mirror left and right")
    add("--drop-hot-pixels", action="store_true", help="leave out pixels that fire far more often than the others")
    add("--sensor", type=arguments.sensor, metavar="WxH", help="sensor size where the recording does not say")
    parser.epilog = "exit code: 0, or 2 if the recording cannot be used or the file not be written"


def run(args: argparse.Namespace) -> int:
    """Draws `args.source` into `args.out`; returns the exit code."""
    try:
        require("PIL.Image", "demo", "preview")
        if _is_preprocessed(args.source):
            return _run_on_representations(args)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            events = read(args.source, args.sensor)
        whole, silent = events, 0
        if args.drop_hot_pixels:
            pixels = hot_pixels(events)
            events, silent = drop_pixels(events, pixels), int(pixels.sum())
        if args.flip:
            events = flip_horizontal(events)
        save_animation(args.out, preview(events, args.frames, args.width), 1000 // min(args.rate, 1000))
    except (RecordingError, ValueError, ImportError) as error:
        print("evkernels preview: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except OSError as error:
        print(f"evkernels preview: OUT {args.out}: cannot be written to: {error.strerror or error}", file=sys.stderr)
        return 2
    for warning in caught:
        print(warning.message)
    length = -(-(events.duration + 1) // args.frames)
    hot = f", without {len(whole) - len(events):,} of {silent} hot pixels" if args.drop_hot_pixels else ""
    print(f"{args.source}: {whole}{hot}")
    print(
        f"{args.out}: {args.frames} frames of {length / 1000:g} ms, at {length * args.rate / 1e6:.2g} times real speed"
    )
    return 0


def _run_on_representations(args: argparse.Namespace) -> int:
    if args.flip or args.drop_hot_pixels:
        raise ValueError("--flip and --drop-hot-pixels are for recordings, not for what was made of them")
    pictures = list(preview_representations(args.source, args.frames, args.width))
    save_animation(args.out, pictures, 1000 // min(args.rate, 1000))
    print(f"{args.out}: {len(pictures)} frames of {args.source}")
    return 0
