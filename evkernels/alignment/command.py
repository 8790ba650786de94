"""`python -m evkernels align train | evaluate | diagnose`: alignment from the command line.

A source is a folder of features (event_features and target_features as .npy, .safetensors or .pt, or such folders
`train` and `val`), recordings with `--weights` of a reconstruction network, whose frames are the targets, or a folder
of N-MNIST, whose digits are drawn. `torchrun -m evkernels align train ...` trains in several processes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from evkernels import arguments
from evkernels.arguments import InputError
from evkernels.events import RecordingError
from evkernels.events.optional import require

STRATEGIES = ("auto", "contrastive", "lightweight", "triple_modal")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `run` to a parser."""
    commands = parser.add_subparsers(dest="action", required=True, title="actions")
    train = commands.add_parser("train", help="train a module on pairs")
    _add_source(train)
    train.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for alignment_DURATION or alignment"
    )
    train.add_argument("--strategy", choices=STRATEGIES, default="auto", help="auto: by the number of pairs")
    train.add_argument("--num_epochs", "--epochs", type=arguments.positive, default=20, metavar="N")
    train.add_argument("--batch_size", type=arguments.positive, metavar="N", help="pairs of all processes together")
    train.add_argument("--learning_rate", type=float, metavar="X", help="default: the strategy's")
    train.add_argument(
        "--patience", type=int, default=5, metavar="N", help="epochs without a better loss; 0: all epochs"
    )
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a field of the strategy's configuration"
    )
    train.add_argument("--held_out", type=float, default=0.2, metavar="SHARE", help="pairs to validate on, default 0.2")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    train.add_argument("--resume", action="store_true", help="go on with what a stopped or killed run left in DIR")
    evaluate = commands.add_parser("evaluate", help="retrieval, similarity, pictures and a report of a checkpoint")
    evaluate.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="alignment.safetensors of a training")
    _add_source(evaluate)
    evaluate.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for report.md and pictures")
    diagnose = commands.add_parser("diagnose", help="how far apart features are, before or after alignment")
    _add_source(diagnose)
    diagnose.add_argument("--checkpoint", type=Path, metavar="FILE", help="align the event features with it first")


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SRC", help="features, recordings, or N-MNIST")
    parser.add_argument(
        "--durations", nargs="+", type=_duration, metavar="TIME",
        help="window lengths such as 200ms 500ms 1s: one alignment each; of features, the folders SRC/TIME",
    )  # fmt: skip
    parser.add_argument("--weights", type=Path, metavar="FILE", help="FireNet, E2VID or CISTA-TC, for recordings")
    parser.add_argument("--encoder", metavar="NAME", help="timm:MODEL or open_clip:MODEL, for the frames' features")
    parser.add_argument("--encoder_weights", type=Path, metavar="FILE", help="the encoder's weights")


def _duration(text: str) -> tuple[str, int]:
    return text, arguments.duration(text)


def run(args: argparse.Namespace) -> int:
    """Runs one action.

    Returns:
        0; 2 if something cannot be used (one line on stderr says why); 130 if the user stopped it: what --resume needs
        is complete.
    """
    try:
        for library in ("safetensors", "rich", "matplotlib", *["sklearn"] * (args.action == "evaluate")):
            require(library, "align", "align")
        from evkernels.alignment import job

        return {"train": job.train, "evaluate": job.evaluate, "diagnose": job.diagnose}[args.action](args)
    except OSError as error:
        reason = str(error) if args.action == "diagnose" else arguments.cannot_write(args.out, error)
        print(f"evkernels align: {reason}", file=sys.stderr)
        return 2
    except (InputError, ImportError, ValueError, NotImplementedError, RecordingError) as error:
        print("evkernels align: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except FloatingPointError as error:
        print(f"evkernels align: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("evkernels align: interrupted; --resume goes on after the last complete epoch", file=sys.stderr)
        return 130
