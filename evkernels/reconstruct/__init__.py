"""Video from events: `python -m evkernels reconstruct RECORDING --weights CHECKPOINT --out DIR`.

Input is examined first, so that a bad recording or checkpoint is answered by one line and exit code 2 before anything
is written. Libraries of the extra `demo` are imported by `run` and not on top, because adding the arguments must work
without them.
"""

import argparse
import sys
import warnings
from pathlib import Path

from evkernels import arguments
from evkernels.arguments import InputError
from evkernels.events import Events, RecordingError, read
from evkernels.events.optional import require

_MODELS = ("auto", "firenet", "e2vid", "cista-tc")
_SMALLEST_SIDE = 16
_MOST_PIXELS = 4_000_000
_MOST_FRAMES = 100_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `run` to a parser."""
    parser.add_argument(
        "recording", type=Path, metavar="RECORDING", help=".npz, .txt, .zip, .raw, .dat, .aedat4, .h5 or .mat"
    )
    parser.add_argument(
        "--weights", type=Path, required=True, metavar="FILE", help="checkpoint of FireNet, E2VID or CISTA-TC"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the video")
    parser.add_argument("--model", choices=_MODELS, default="auto", help="network the weights must be of")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--window", type=arguments.duration, default=33_333, metavar="TIME", help="time per frame, default 33.333ms"
    )
    length.add_argument("--events-per-frame", type=arguments.positive, metavar="N", help="instead of a fixed time")
    parser.add_argument("--format", choices=("png", "gif"), default="png", help="numbered frames, or one animation")
    parser.add_argument("--sensor", type=arguments.sensor, metavar="WxH", help="where the recording does not say")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    earlier = parser.add_mutually_exclusive_group()
    earlier.add_argument("--overwrite", action="store_true", help="delete the video of an earlier run in DIR first")
    earlier.add_argument("--resume", action="store_true", help="go on with what a stopped or killed run left in DIR")


def run(args: argparse.Namespace) -> int:
    """Reconstructs the recording and writes the video to `args.out`.

    Returns:
        0; 2 if the input cannot be used or the output not be written (one line on stderr says why); 130 if the user
        stopped it: the frames until then are complete.
    """
    try:
        for library in ("rich", "PIL"):
            require(library, "demo", "reconstruct")
        device = arguments.device(args.device)
        events, notes = _events(args)
        # Only here, because it imports torch.
        from evkernels.reconstruct import job, progress, weights

        if args.resume and args.format == "gif":
            raise InputError("--resume is for numbered frames: an animation is written at the end")
        name, model = weights.load_network(args.weights, None if args.model == "auto" else args.model)
        record = _record(args, events)
        begun = progress.load(args.out, record) if args.resume else progress.Progress(record)
        video = job.Video(args.out, args.format, args.overwrite, begun if args.resume else None)
    except (InputError, RecordingError, ImportError) as error:
        return _failed(error)
    if args.resume and not begun.frames:
        notes.append(f"--resume: {args.out} holds no frames to go on from, the video begins at its first")
    facts = [f"recording: {args.recording}, {len(events):,} events on {events.width}x{events.height} pixels", *notes]
    try:
        return job.reconstruct(
            model.to(device), name, events, facts, args.window, args.events_per_frame, device, video, begun
        )
    except OSError as error:
        return _failed(arguments.cannot_write(args.out, error))


def _record(args: argparse.Namespace, events: Events) -> dict[str, object]:
    """What decides what the frames show."""
    return {
        "weights": f"{args.weights.name} of {args.weights.stat().st_size} bytes",
        "recording": f"{args.recording.name} of {len(events)} events on {events.width}x{events.height} pixels",
        "window": args.window if args.events_per_frame is None else None,
        "events_per_frame": args.events_per_frame,
    }


def _failed(reason: object) -> int:
    print("evkernels reconstruct: " + " ".join(str(reason).split()), file=sys.stderr)
    return 2


def _events(args: argparse.Namespace) -> tuple[Events, list[str]]:
    """The events and what there is to say about them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        events = read(args.recording, args.sensor)
    size = f"{events.width}x{events.height}"
    if min(events.width, events.height) < _SMALLEST_SIDE or events.width * events.height > _MOST_PIXELS:
        raise InputError(
            f"{args.recording}: expected a sensor of at least {_SMALLEST_SIDE}x{_SMALLEST_SIDE} and at most "
            f"{_MOST_PIXELS} pixels, got {size}; --sensor WxH sets it where the recording does not say"
        )
    count = frame_count(events, args.window, args.events_per_frame)
    if count > _MOST_FRAMES:
        raise InputError(
            f"{args.recording}: expected at most {_MOST_FRAMES} frames, got {count} windows over "
            f"{events.duration / 1e6:.3f} s; --window or --events-per-frame makes them longer"
        )
    return events, [str(warning.message) for warning in caught if warning.category is UserWarning]


def frame_count(events: Events, window_us: int, events_per_frame: int | None) -> int:
    """How many windows `Events.windows` will give."""
    if events_per_frame is None:
        return events.duration // window_us + 1
    return -(-len(events) // events_per_frame)
