"""Command line: `python -m evkernels status`, `demo`, `preprocess`, `preview`, `reconstruct`, `train` and more."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from evkernels import status

# Each module has add_arguments(parser) and run(arguments) -> exit code.
_COMMANDS = {
    "demo": ("evkernels.demo", "run the main job on a recording, fused against reference"),
    "preprocess": ("evkernels.preprocess", "make event representations of recordings, for training"),
    "preview": ("evkernels.events.preview", "draw a recording as a short animation"),
    "compare-time-embeddings": ("evkernels.compare_time_embeddings", "train LSTMs that differ in their time embedding"),
    "reconstruct": ("evkernels.reconstruct", "make a video from a recording's events"),
    "align": ("evkernels.alignment.command", "align event features to those of images, and evaluate it"),
    "train": ("evkernels.train", "train RVT's detector or EfficientConvLSTM on preprocessed recordings"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit code; what the user can put right ends in one line and exit code 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(prog="evkernels", description="Fused kernels for event-camera recurrent vision.")
    commands = parser.add_subparsers(dest="command", title="commands", parser_class=_Parser)
    commands.add_parser("status", help="say what runs where and why: the text for bug reports")
    for name, (module, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        # Only the one that is asked for: they import readers and a simulator that nothing else needs.
        if argv[:1] == [name]:
            import_module(module).add_arguments(command)
    arguments = parser.parse_args(argv)
    if arguments.command in _COMMANDS:
        return import_module(_COMMANDS[arguments.command][0]).run(arguments)
    if arguments.command == "status":
        print(status())
    else:
        parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
