"""A run's folder: checkpoints, logs, and what is said while it goes on. Of several processes the first writes."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch

from evkernels import arguments, backends
from evkernels.arguments import InputError
from evkernels.demo.terminal import Terminal
from evkernels.train import processes
from evkernels.train.logs import LOSSES, MEASURES, Logs
from evkernels.train.settings import Settings
from evkernels.train.trainer import Trainer

LAST, BEST = "last.ckpt", "best.ckpt"


def prepare(settings: Settings, folder: Path, device: torch.device, resume: bool) -> Trainer:
    """A trainer where the run begins or goes on; raises before anything is written if something is wrong."""
    trainer = Trainer(settings, device)
    last = folder / LAST
    if last.exists() and not resume:
        raise InputError(f"--out {folder}: holds {LAST} of an earlier run; --resume goes on from it")
    if last.exists():
        trainer.load(last)
    if processes.rank() == 0:
        arguments.output_folder(folder)
    # None writes before all have looked.
    processes.wait()
    return trainer


def train(trainer: Trainer, folder: Path, resume: bool) -> int:
    """Trains to the last step; returns the exit code.

    Raises:
        OSError: if checkpoints or logs cannot be written; the last checkpoint is complete.
    """
    if processes.rank():
        _steps(trainer, folder, None, lambda: None)
        return 0
    settings, terminal = trainer.settings, Terminal()
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    kernels, _ = backends.serving("conv_lstm_1x1", trainer.device.type)
    together = f", {processes.count()} processes" if processes.count() > 1 else ""
    terminal.line(f"{parameters:,} parameters on {trainer.device}{together}, kernels: {kernels}")
    if trainer.step:
        terminal.line(f"going on after step {trainer.step}")
    elif resume:
        terminal.line(f"--resume: {folder} holds no {LAST}, training begins at step 0")
    left = settings.steps - trainer.step
    try:
        with (
            closing(Logs(folder, trainer.step, settings.tensorboard)) as logs,
            terminal.step(f"training, {left} steps", left) as advance,
        ):
            _steps(trainer, folder, logs, advance)
    except KeyboardInterrupt:
        terminal.line("interrupted; --resume goes on from the last checkpoint")
        return 130
    best = f"best {trainer.task.measure} {trainer.best:.3f}; " if math.isfinite(trainer.best) else ""
    terminal.line(f"{best}checkpoints and logs in {folder}")
    return 0


def _steps(trainer: Trainer, folder: Path, logs: Logs | None, advance: Callable[[], None]) -> None:
    for batch in islice(trainer.batches(), trainer.settings.steps - trainer.step):
        losses = trainer.train_step(batch)
        if logs:
            logs.write(LOSSES, losses)
        _keep(trainer, folder, logs)
        advance()


def _keep(trainer: Trainer, folder: Path, logs: Logs | None) -> None:
    """Validates and writes checkpoints where it is time, and at the end."""
    settings, ends = trainer.settings, trainer.step == trainer.settings.steps
    if ends or trainer.step % settings.validate_every == 0:
        result = trainer.validate()
        if logs:
            logs.write(MEASURES, result)
        if result[trainer.task.measure] > trainer.best:
            trainer.best = result[trainer.task.measure]
            trainer.save(folder / BEST)
    if ends or trainer.step % settings.checkpoint_every == 0:
        trainer.save(folder / LAST)
