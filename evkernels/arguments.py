"""Arguments that several subcommands take, and the error that ends in one line and exit code 2."""

import argparse
import errno
import re
import tempfile
from pathlib import Path

_MICROSECONDS = {"us": 1, "ms": 1_000, "s": 1_000_000}


class InputError(Exception):
    """What was asked for cannot be done; the message is one line for the user."""


def output_folder(out: Path) -> None:
    """Makes the folder of --out, and a file in it for a moment.

    Raises:
        InputError: if that cannot be done.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise InputError(cannot_write(out, OSError(error.errno, error.strerror))) from error


def cannot_write(out: Path, error: OSError) -> str:
    """What to say of an error of the system while --out is written to; the error may be of another file."""
    reason = "it is a file" if error.errno == errno.EEXIST else error.strerror or str(error)
    file = out if error.filename is None else Path(error.filename)
    if file != out and out not in file.parents:
        return f"{file}: {reason}"
    return f"--out {out}: cannot be written to: {reason}" + ("" if file == out else f" ({file.relative_to(out)})")


def device(name: str):
    """The torch.device `name`, if this machine has it.

    Raises:
        InputError: if it has not, or the name is no device's.
    """
    import torch

    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from error
    if found.type not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count() if found.type == "cuda" else 0
    if found.type == "cuda" and (found.index or 0) >= count:
        raise InputError(f"--device {name}: this torch ({torch.__version__}) finds {count} CUDA devices")
    return found


def sensor(text: str) -> tuple[int, int]:
    """(width, height) of "WxH"."""
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"must be WxH such as 346x260, got {text!r}")
    return int(width), int(height)


def duration(text: str) -> int:
    """Microseconds from a number with a unit; decimal places as far as they are whole microseconds."""
    match = re.fullmatch(r"(\d{1,12})(?:\.(\d{1,6}))?\s*(us|ms|s)", text.strip().lower())
    if match:
        whole, fraction, unit = match[1], match[2] or "", _MICROSECONDS[match[3]]
        value, rest = divmod(int(whole + fraction) * unit, 10 ** len(fraction))
        if value > 0 and rest == 0:
            return value
    raise argparse.ArgumentTypeError(f"must be whole microseconds, such as 50ms, 2.5ms or 10000us, got {text!r}")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or not 0 < int(text) < 2**62:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)
