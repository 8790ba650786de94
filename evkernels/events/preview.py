"""`python -m evkernels preview`: a recording as a short animation, to see what is in it before working with it."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from evkernels import arguments

from .container import Events
from .decoders import RecordingError
from .draw import event_frame, save_animation
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `run` to a parser."""
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="a recording: .npz, .txt, .zip, .raw, .dat, .aedat4, .h5 or .mat")
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
    except (RecordingError, ValueError, ImportError, OSError) as error:
        print("evkernels preview: " + " ".join(str(error).split()), file=sys.stderr)
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
