"""`python -m evkernels preprocess`: recordings to the event representations that RVT's data loader reads.

Every recording becomes one HDF5 file of frames, in memory bounded by one packet of events and one batch of frames.
A file appears under its name only when it is whole, so a run that was killed is taken up by the same command again.
Input is examined before anything is written; what one recording lacks does not keep the others from being made.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from evkernels import arguments
from evkernels.arguments import InputError
from evkernels.events.optional import require
from evkernels.preprocess.sources import find

_MOST_BINS = 1000
_EXIT_CODES = (
    "exit code: 0 if every recording was made or had been made before; 2 if the arguments or a recording cannot be "
    "used (the others are made); 1 if anything else went wrong, such as a full disk or lost worker; 130 if interrupted"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `run` to a parser."""
    from evkernels.preprocess.settings import REPRESENTATIONS, Settings

    defaults = Settings()
    parser.epilog = _EXIT_CODES
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="a recording, or a folder of them such as RVT's and eTraM's trees")
    add("destination", type=Path, metavar="DST", help="folder of the results, one folder inside per recording")
    add("--representation", choices=list(REPRESENTATIONS), default=defaults.representation)
    add("--bins", type=arguments.positive, default=defaults.bins, help="time bins per window, default %(default)s")
    add("--count-cutoff", type=arguments.positive, metavar="N", help="largest count, default 255; RVT trains with 10")
    add("--window", type=arguments.duration, default="50ms", metavar="TIME", help="default %(default)s")
    add("--stride", type=arguments.duration, metavar="TIME", help="between the ends of windows, default: the window")
    add("--downsample", type=arguments.positive, default=1, metavar="N", help="keep one of N x N pixels; RVT's Gen4: 2")
    add("--no-labels", action="store_true", help="ignore boxes in <name>_bbox.npy; else windows end with them")
    add("--sensor", type=arguments.sensor, metavar="WxH", help="sensor size where recordings do not say")
    add("--pattern", default="*", help="which names to take from a folder, such as '*_td.h5'")
    add("--jobs", type=arguments.positive, default=1, metavar="N", help="recordings at a time, default %(default)s")
    add("--scheduler", metavar="ADDRESS", help="Dask scheduler whose workers see the same files")
    add("--overwrite", action="store_true", help="make again what is there")


def run(args: argparse.Namespace) -> int:
    """Preprocesses `args.source` into `args.destination`; returns the exit code."""
    from evkernels.preprocess import pool
    from evkernels.preprocess.settings import Settings
    from evkernels.preprocess.writer import libraries

    settings = Settings(
        args.representation,
        args.bins,
        args.count_cutoff,
        args.window,
        args.stride or args.window,
        args.downsample,
        not args.no_labels,
        args.sensor,
    )
    try:
        require("rich", "preprocess", "preprocessing")
        libraries()
        if args.bins > _MOST_BINS:
            raise InputError(f"--bins must be at most {_MOST_BINS}, got {args.bins}")
        if args.scheduler and args.jobs != 1:
            raise InputError("--jobs and --scheduler exclude each other: the cluster has its own workers")
        pairs = find(args.source.absolute(), args.destination.absolute(), args.pattern)
        with pool.workers(args.jobs, args.scheduler) as executor:
            return pool.run(pairs, settings, args.overwrite, executor)
    except (InputError, ImportError) as error:
        print("evkernels preprocess: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evkernels preprocess: interrupted; the same command goes on", file=sys.stderr)
        return 130
