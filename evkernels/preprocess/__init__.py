"""`python -m evkernels preprocess`: recordings to the event representations that RVT's data loader reads.

Every recording becomes one HDF5 file of frames, in memory bounded by one packet of events and one batch of frames.
A file appears under its name only when it is whole, so a run that was killed is taken up by the same command again.
Input is examined before anything is written; what one recording lacks does not keep the others from being made.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
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
    from evkernels.ops.voxel_grid import NORMALIZATIONS
    from evkernels.preprocess.representations import REPRESENTATIONS
    from evkernels.reference.voxel_grid import CONVENTIONS

    parser.epilog = _EXIT_CODES
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="a recording, or a folder of them such as RVT's and eTraM's trees")
    add("destination", type=Path, metavar="DST", help="folder of the results, one folder inside per recording")
    add(
        "--representation",
        choices=list(REPRESENTATIONS),
        default="stacked_histogram",
        help="default %(default)s; hats: an image of cells of 10 x 10 pixels; est: with the kernel it begins with",
    )
    add("--bins", type=arguments.positive, help="time bins per window, default 10, of a voxel grid 5, of est 9")
    add("--count-cutoff", type=arguments.positive, metavar="N", help="largest count, default: what the dtype holds")
    add("--convention", choices=list(CONVENTIONS), help="whose voxel grid, default e2vid")
    add("--normalize", choices=[name for name in NORMALIZATIONS if name], help="cells of a voxel grid that are not 0")
    add(
        "--tau",
        type=arguments.duration,
        metavar="TIME",
        help="time constant of a time surface, default 50ms, of hats 1s",
    )
    add("--depth", type=arguments.positive, metavar="N", help="events per pixel and polarity of tore, default 4")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--window", type=arguments.duration, default="50ms", metavar="TIME", help="default %(default)s")
    length.add_argument("--window-events", type=arguments.positive, metavar="N", help="windows of N events instead")
    add(
        "--stride",
        type=arguments.duration,
        metavar="TIME",
        help="between the ends of windows, default: the window; windows of N events follow one another, or with "
        "--stride or labels are the last N events every so often",
    )
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
    from evkernels.preprocess.writer import libraries

    try:
        require("rich", "preprocess", "preprocessing")
        libraries()
        if args.bins is not None and args.bins > _MOST_BINS:
            raise InputError(f"--bins must be at most {_MOST_BINS}, got {args.bins}")
        if args.scheduler and args.jobs != 1:
            raise InputError("--jobs and --scheduler exclude each other: the cluster has its own workers")
        settings = _settings(args)
        pairs = find(args.source.absolute(), args.destination.absolute(), args.pattern)
        return pool.run(pairs, settings, args.overwrite, partial(pool.workers, args.jobs, args.scheduler))
    except (InputError, ImportError) as error:
        print("evkernels preprocess: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evkernels preprocess: interrupted; the same command goes on", file=sys.stderr)
        return 130


def _settings(args: argparse.Namespace):
    from evkernels.preprocess.settings import Settings

    stride = args.stride if args.window_events is not None else args.stride or args.window
    return Settings.of(
        args.representation,
        bins=args.bins,
        count_cutoff=args.count_cutoff,
        convention=args.convention,
        normalize=args.normalize,
        tau_us=args.tau,
        depth=args.depth,
        window_us=args.window,
        window_events=args.window_events,
        stride_us=stride,
        downsample=args.downsample,
        labels=not args.no_labels,
        sensor=args.sensor,
    )
