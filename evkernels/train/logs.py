"""Logs of a run: CSV files, and event files for TensorBoard."""

from __future__ import annotations

import csv
from pathlib import Path

from evkernels import files

LOSSES, MEASURES = "losses.csv", "validation.csv"
_TENSORBOARD = "tensorboard"


class Logs:
    """The logs in a folder.

    Args:
        folder: Where they are, and go on.
        step: Rows after this step are of a run that was stopped, and will be taken again.
        tensorboard: Whether there are event files too, in `tensorboard/`; needs the library.
    """

    def __init__(self, folder: Path, step: int, tensorboard: bool) -> None:
        self._folder = folder
        for path in (folder / LOSSES, folder / MEASURES):
            if path.exists():
                lines = path.read_text().splitlines()
                # A run that could not write on, as of a full disk, may have left half a row, or no header.
                whole = [line for line in lines if line.count(",") == lines[0].count(",")]
                kept = whole[:1] + [row for row in whole[1:] if int(row.split(",")[0]) <= step]
                if step:
                    files.write_text(path, "".join(f"{line}\n" for line in kept))
                else:
                    path.unlink()
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder / _TENSORBOARD, purge_step=step + 1)

    def write(self, name: str, row: dict[str, float]) -> None:
        """Appends a row, whose first value is "step", to a CSV file, under a header, and to the event file."""
        path = self._folder / name
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        if self._writer:
            for key, value in row.items():
                if key != "step":
                    self._writer.add_scalar(f"{Path(name).stem}/{key}", value, row["step"])

    def close(self) -> None:
        """Writes out what is still in memory."""
        if self._writer:
            self._writer.close()
