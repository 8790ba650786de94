"""Command line: `python -m evkernels status`, `demo`, `preprocess`, `preview`."""

import argparse
import sys
from collections.abc import Sequence

from evkernels import status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit code; what the user can put right ends in one line and exit code 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(prog="evkernels", description="Fused kernels for event-camera recurrent vision.")
    commands = parser.add_subparsers(dest="command", title="commands", parser_class=_Parser)
    commands.add_parser("status", help="say what runs where and why: the text for bug reports")
    demo_parser = commands.add_parser("demo", help="run the main job on a recording, fused against reference")
    preprocess_parser = commands.add_parser("preprocess", help="make event representations of recordings, for training")
    preview_parser = commands.add_parser("preview", help="draw a recording as a short animation")
    command = None
    # Only here: they import readers and a simulator that nothing else needs.
    if argv[:1] == ["demo"]:
        from evkernels import demo as command

        command.add_arguments(demo_parser)
    elif argv[:1] == ["preprocess"]:
        from evkernels import preprocess as command

        command.add_arguments(preprocess_parser)
    elif argv[:1] == ["preview"]:
        from evkernels.events import preview as command

        command.add_arguments(preview_parser)
    arguments = parser.parse_args(argv)
    if command is not None:
        return command.run(arguments)
    if arguments.command == "status":
        print(status())
    else:
        parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main())
