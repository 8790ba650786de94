"""A run's folder: checkpoints, logs, and what is said while it goes on."""

from __future__ import annotations

import csv
from itertools import islice
from pathlib import Path

import torch

from evkernels import backends
from evkernels.arguments import InputError
from evkernels.demo.terminal import Terminal
from evkernels.train.settings import Settings
from evkernels.train.trainer import Trainer

LAST, BEST, LOSSES, PRECISIONS = "last.ckpt", "best.ckpt", "losses.csv", "validation.csv"


class Run:
    """A trainer with its folder."""

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer, self.folder = trainer, folder

    def log(self, name: str, row: dict[str, float]) -> None:
        """Appends a row to a CSV file, under a header."""
        path = self.folder / name
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if is_new:
                writer.writeheader()
            writer.writerow(row)

    def forget_later_rows(self) -> None:
        """Rows of steps that a checkpoint does not know are taken again."""
        for path in (self.folder / LOSSES, self.folder / PRECISIONS):
            if path.exists():
                header, *rows = path.read_text().splitlines()
                kept = [row for row in rows if int(row.split(",")[0]) <= self.trainer.step]
                path.write_text("\n".join([header, *kept]) + "\n")


def prepare(settings: Settings, folder: Path, device: torch.device, resume: bool) -> Run:
    """Everything a run needs; raises before anything is written if something is wrong."""
    trainer = Trainer(settings, device)
    last = folder / LAST
    if last.exists() and not resume:
        raise InputError(f"--out {folder}: holds {LAST} of an earlier run; --resume goes on from it")
    if last.exists():
        trainer.load(last)
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(trainer, folder)
    run.forget_later_rows()
    return run


def train(run: Run) -> int:
    """Trains to the last step; returns the exit code."""
    trainer, settings, terminal = run.trainer, run.trainer.settings, Terminal()
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    kernels, _ = backends.serving("conv_lstm_1x1", trainer.device.type)
    terminal.line(f"{parameters:,} parameters on {trainer.device}, kernels: {kernels}")
    if trainer.step:
        terminal.line(f"going on after step {trainer.step}")
    try:
        left = settings.steps - trainer.step
        with terminal.step(f"training, {left} steps", left) as advance:
            for batch in islice(trainer.batches(), left):
                run.log(LOSSES, trainer.train_step(batch))
                _keep(run)
                advance()
    except KeyboardInterrupt:
        terminal.line("interrupted; --resume goes on from the last checkpoint")
        return 130
    terminal.line(f"best AP {trainer.best:.3f}; checkpoints and logs in {run.folder}")
    return 0


def _keep(run: Run) -> None:
    """Validates and writes checkpoints where it is time, and at the end."""
    trainer, settings = run.trainer, run.trainer.settings
    ends = trainer.step == settings.steps
    if ends or trainer.step % settings.validate_every == 0:
        result = trainer.validate()
        run.log(PRECISIONS, result)
        if result["AP"] > trainer.best:
            trainer.best = result["AP"]
            trainer.save(run.folder / BEST)
    if ends or trainer.step % settings.checkpoint_every == 0:
        trainer.save(run.folder / LAST)
