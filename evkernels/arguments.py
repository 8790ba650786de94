"""Types of command line arguments that several commands take; each raises with what was expected and what came."""

import argparse
import re

_MICROSECONDS = {"us": 1, "ms": 1_000, "s": 1_000_000}


def sensor(text: str) -> tuple[int, int]:
    """Width and height from WxH."""
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
    """An integer from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)
