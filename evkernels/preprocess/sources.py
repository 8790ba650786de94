"""Which recordings there are to preprocess, and where their results go."""

from __future__ import annotations

import re
from pathlib import Path

from evkernels.arguments import InputError
from evkernels.events.decoders import DECODERS


def find(source: Path, destination: Path, pattern: str = "*") -> list[tuple[Path, Path]]:
    """Recordings and the folders of their results.

    Args:
        source: A recording, or a folder that is searched with all folders below.
        destination: Folder of all results; a recording's has the same place inside as the recording has in `source`.
            If it lies in `source`, it is not searched.
        pattern: Which names to take of those with a known ending, as in a shell.

    Returns:
        Pairs, sorted by the recording's path. RVT's `<name>_td.dat.h5` and eTraM's `<name>_td.h5` are called <name>.

    Raises:
        InputError: if there are none, or two would have the same folder.
    """
    if not source.exists():
        raise InputError(f"{source}: expected a recording or a folder, got no such file")
    if not source.is_dir():
        return [(source, destination / _sequence(source))]
    below = destination.resolve()
    found = [
        path
        for path in sorted(source.rglob(pattern))
        if path.suffix.lower() in DECODERS and path.is_file() and below not in path.resolve().parents
    ]
    if not found:
        kinds = ", ".join(DECODERS)
        raise InputError(f"{source}: expected recordings named {pattern} that end with one of {kinds}, got none")
    pairs = [(path, destination / path.parent.relative_to(source) / _sequence(path)) for path in found]
    first: dict[Path, Path] = {}
    for path, folder in pairs:
        if first.setdefault(folder, path) != path:
            raise InputError(f"{first[folder]} and {path} would share {folder}; choose with --pattern")
    return pairs


def _sequence(path: Path) -> str:
    return re.sub(r"_td(\.dat)?$", "", path.stem)
