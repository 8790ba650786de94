"""The main job on one recording: histograms, encoder, training, pictures; every step against plain PyTorch.

`python -m evkernels demo` proves on the user's own machine and events that the fused ops compute what plain PyTorch
computes, and shows what that costs and saves. Input is examined first, so that a bad recording is answered by one line
and exit code 2 and anything raised later is a fault of the program. Libraries of the extra `demo` are imported here and
not on top, because adding the arguments must work without them.
"""

import argparse
import sys
import warnings
from pathlib import Path

from evkernels import arguments
from evkernels.arguments import InputError
from evkernels.events import Events, RecordingError, read, simulate
from evkernels.events.optional import require

_SMALLEST_SIDE = 16  # The encoder halves four times.
_MOST_PIXELS = 4_000_000
_FEWEST_WINDOWS = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `run` to a parser."""
    parser.add_argument(
        "recording",
        nargs="?",
        type=Path,
        metavar="RECORDING",
        help=".npz, .txt, .zip, .raw, .dat, .aedat4, .h5 or .mat; without it, a simulated camera pan",
    )
    parser.add_argument(
        "--sensor", type=arguments.sensor, metavar="WxH", help="sensor size where the recording does not say"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--out", type=Path, default=Path("demo-output"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--windows", type=int, default=12, metavar="N", help="windows to cut into, default %(default)s")
    parser.add_argument("--steps", type=int, default=36, metavar="N", help="training steps, default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of weights and crops, default %(default)s")


def run(args: argparse.Namespace) -> int:
    """Runs the main job and writes pictures and report.md to `args.out`.

    Returns:
        0, 1 if anything disagreed, 2 if the input cannot be used or the results not be written (one line on stderr says
        why), 130 if the user stopped it.
    """
    try:
        for library in ("rich", "matplotlib"):
            require(library, "demo", "the demo")
        device = arguments.device(args.device)
        events, notes = _events(args)
        arguments.output_folder(args.out)
    except (InputError, RecordingError, ImportError) as error:
        return _failed(error)
    from evkernels.demo.job import main_job

    name = str(args.recording) if args.recording else "simulated camera pan"
    try:
        return main_job(name, events, notes, device, args.out, args.windows, args.steps, args.seed)
    except OSError as error:
        return _failed(arguments.cannot_write(args.out, error))
    except KeyboardInterrupt:
        print("evkernels demo: interrupted", file=sys.stderr)
        return 130


def _failed(reason: object) -> int:
    print("evkernels demo: " + " ".join(str(reason).split()), file=sys.stderr)
    return 2


def _events(args: argparse.Namespace) -> tuple[Events, list[str]]:
    """The events and what there is to say about them."""
    for name, least in (("windows", _FEWEST_WINDOWS), ("steps", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} must be at least {least}, got {getattr(args, name)}")
    if args.recording is None and args.sensor:
        width, height = args.sensor
        try:
            events, notes = simulate(width=width, height=height), []
        except ValueError as error:
            raise InputError(f"--sensor {width}x{height}: {error}") from error
    elif args.recording is None:
        events, notes = simulate(), []
    else:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            events = read(args.recording, args.sensor)
        notes = [str(warning.message) for warning in caught if warning.category is UserWarning]
    where = args.recording or "the simulation"
    size = f"{events.width}x{events.height}"
    if min(events.width, events.height) < _SMALLEST_SIDE or events.width * events.height > _MOST_PIXELS:
        raise InputError(
            f"{where}: expected a sensor of at least {_SMALLEST_SIDE}x{_SMALLEST_SIDE} and at most {_MOST_PIXELS} "
            f"pixels, got {size}; --sensor WxH sets it where the recording does not say"
        )
    if events.duration < args.windows:
        raise InputError(
            f"{where}: expected events over at least {args.windows} microseconds to cut {args.windows} windows from, "
            f"got {len(events)} events within {events.duration} microseconds"
        )
    return events, notes
