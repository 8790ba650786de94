"""Files that appear under their names when they are whole, or not at all, even if the disk is full."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO


def write(path: Path, save: Callable[[BinaryIO], object]) -> None:
    """Writes a file beside `path` and gives it that name.

    Args:
        path: The file to make or replace.
        save: Writes the content to the open file it is given, such as `partial(torch.save, state)`.

    Raises:
        OSError: if it cannot be written; with `path` as its filename, and nothing is left.
    """
    beside = path.with_name(f".{path.name}.partial")
    try:
        with open(beside, "wb") as file:
            save(file)
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:
        # torch.save raises a RuntimeError of its own while it handles the system's error.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from error
    finally:
        # In a folder that is none there is nothing to remove.
        if beside.parent.is_dir():
            beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """`write` of text in UTF-8."""
    write(path, lambda file: file.write(text.encode()))


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """`write` of a CSV file, the keys of the first row as its header."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
