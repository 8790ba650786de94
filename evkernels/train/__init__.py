"""`python -m evkernels train MODEL CONFIG --out DIR`: trains a published network on preprocessed recordings.

MODEL is rvt, the detector, or efficient_conv_lstm. The configuration is examined before anything is written. A run that
was stopped goes on from its last checkpoint with `--resume`, to the same numbers as if it had not been. Several
processes train together with `torchrun --nproc-per-node N -m evkernels train ...`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from evkernels import arguments
from evkernels.arguments import InputError
from evkernels.events.optional import require

if TYPE_CHECKING:
    import torch

    from evkernels.train.settings import Settings

_LIBRARIES = {"rvt": ("omegaconf", "rich", "pycocotools"), "efficient_conv_lstm": ("omegaconf", "rich")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `run` to a parser."""
    parser.epilog = "the keys of CONFIG and their defaults are those of the classes in evkernels.train.settings"
    parser.add_argument("model", choices=sorted(_LIBRARIES), metavar="MODEL", help="rvt or efficient_conv_lstm")
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for checkpoints and logs")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="instead of what CONFIG says; may be repeated"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in DIR; where there is none, begin"
    )


def run(args: argparse.Namespace) -> int:
    """Trains into `args.out`.

    Returns:
        0; 2 if the configuration or data cannot be used or the results not be written (one line on stderr says why);
        130 if the user stopped it: the last checkpoint is complete.
    """
    try:
        for library in _LIBRARIES[args.model]:
            require(library, "train", "training")
        device = arguments.device(args.device)
        from evkernels.train import processes
        from evkernels.train.settings import load

        settings = load(args.model, args.config, args.set)
        if settings.tensorboard:
            require("tensorboard", "train", "tensorboard=true")
    except (InputError, ImportError) as error:
        return _refused(error)
    with processes.group(device) as device:
        return _train(settings, args, device)


def _train(settings: Settings, args: argparse.Namespace, device: torch.device) -> int:
    from evkernels.train import job

    try:
        trainer = job.prepare(settings, args.out, device, args.resume)
    except (InputError, ImportError, ValueError, OSError) as error:
        return _refused(error)
    try:
        return job.train(trainer, args.out, args.resume)
    except OSError as error:
        return _refused(arguments.cannot_write(args.out, error))


def _refused(error: Exception | str) -> int:
    print("evkernels train: " + " ".join(str(error).split()), file=sys.stderr)
    return 2
