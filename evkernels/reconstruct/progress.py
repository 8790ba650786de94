"""What a run leaves for the one that goes on: the network's state after a frame, and what that was made of.

The file is there from the beginning on, whole, and always counts frames that are there. Frames that come after those
are made again: the same state makes the same frames. With the last frame it stays, without the state, so that the same
command finds nothing left to do, and another one does not take the video for its own.
"""

from __future__ import annotations

import pickle
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from evkernels import files
from evkernels.arguments import InputError

_FILE = ".progress.pt"


@dataclass
class Progress:
    """How far a video is.

    Args:
        record: What it is made of and how.
        frames: How many frames there are.
        state: Of the network after them, on the CPU.
        bounds: Of `IntensityRescaling` after them.
    """

    record: dict[str, Any]
    frames: int = 0
    state: Any = None
    bounds: tuple[tuple[float, float], ...] = ()

    def save(self, folder: Path) -> None:
        files.write(folder / _FILE, partial(torch.save, asdict(self)))


def load(folder: Path, record: dict[str, Any]) -> Progress:
    """What an earlier run left; the beginning where it left nothing.

    Raises:
        InputError: if it was made of something else, or cannot be read, or there are frames and nothing says of what.
    """
    path = folder / _FILE
    if not path.is_file():
        if any(folder.glob("frame_*.png")):
            raise InputError(f"--out {folder}: holds frames, and not what they were made of; --overwrite begins anew")
        return Progress(record)
    try:
        progress = Progress(**torch.load(path, weights_only=True))
    except (RuntimeError, EOFError, TypeError, OSError, pickle.UnpicklingError) as error:
        raise InputError(f"{path}: expected an earlier run's state, got: {error}; --overwrite begins anew") from error
    differing = [name for name in record if progress.record.get(name) != record[name]]
    if differing:
        made = ", ".join(f"{name} {progress.record.get(name)} instead of {record[name]}" for name in differing)
        raise InputError(f"--out {folder}: holds a video made with {made}; --overwrite begins anew")
    return progress


def forget(folder: Path) -> None:
    """Removes what an earlier run left."""
    (folder / _FILE).unlink(missing_ok=True)
