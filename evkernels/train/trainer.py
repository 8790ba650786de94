"""The training loop of a recurrent network: truncated backpropagation over sequences that go on, step by step.

One step is one batch of sequences. The network's state is carried from batch to batch and reset where the data say
that a recording begins; it belongs to the checkpoint like the weights do, and so a resumed run computes the same bits.
Of several processes each has its share of the sequences, and their states are put together in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.data import DataLoader

from evkernels import files
from evkernels.data import RandomSequences, SequenceBatch, StreamingSequences, collate
from evkernels.nn import detach
from evkernels.train import processes
from evkernels.train.detection import Detection
from evkernels.train.prediction import Prediction
from evkernels.train.settings import DetectorSettings, PredictionSettings, Settings

_TASKS = {DetectorSettings: Detection, PredictionSettings: Prediction}


class Trainer:
    """A network with its loss, its optimiser and data; `step` counts the steps taken.

    Args:
        settings: What to train on what.
        device: Where.

    Raises:
        ValueError: if the data or the model's configuration cannot be used.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.device = device
        share, rest = divmod(settings.batch_size, processes.count())
        if rest:
            raise ValueError(
                f"batch_size must be a multiple of the {processes.count()} processes, got {settings.batch_size}"
            )
        kind = {
            "representation": settings.representation,
            "downsample": settings.downsample,
            "targets": getattr(settings, "targets", None),
        }
        if settings.sampling == "stream":
            shard = processes.rank(), processes.count()
            self.data = StreamingSequences(
                settings.train, settings.length, share, shuffle=True, seed=settings.seed, shard=shard, **kind
            )
        else:
            self.data = RandomSequences(settings.train, settings.length, every=_every(settings), **kind)
            if len(self.data) < settings.batch_size:
                raise ValueError(
                    f"batch_size must be at most the {len(self.data)} sequences, got {settings.batch_size}"
                )
        self.validation = StreamingSequences(settings.validate, settings.length, settings.batch_size, **kind)
        self.task = _TASKS[type(settings)](settings, self.data.recordings[0].shape).to(device)
        self.task = processes.synchronized(self.task)
        self.parallel = processes.in_parallel(self.task)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: _rate(step, settings.steps, settings.warmup)
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")
        self.states: Any = None
        self.step = 0
        self.best = -float("inf")

    @property
    def model(self) -> nn.Module:
        """The network."""
        return self.task.network

    def batches(self) -> Iterator[SequenceBatch]:
        """Batches without end, from that of the next step on; of several processes each has its own."""
        streams = self.settings.sampling == "stream"
        size, share = self.settings.batch_size, self.settings.batch_size // processes.count()
        per_epoch = len(self.data) if streams else len(self.data) // size
        epoch, first = divmod(self.step, per_epoch)
        while True:
            options: dict[str, Any] = {"num_workers": self.settings.workers, "pin_memory": self.device.type == "cuda"}
            # Each loader draws a number when it begins: from here, not from what a resumed run's dropouts draw from.
            options["generator"] = torch.Generator()
            if streams:
                self.data.set_epoch(epoch)
                options |= {"batch_size": None, "sampler": range(first, per_epoch)}
            else:
                generator = torch.Generator().manual_seed(self.settings.seed + epoch)
                order = torch.randperm(len(self.data), generator=generator).split(size)
                mine = slice(processes.rank() * share, (processes.rank() + 1) * share)
                chosen = [rows.tolist()[mine] for rows in order[first:per_epoch]]
                options |= {"batch_sampler": chosen, "collate_fn": collate}
            yield from DataLoader(self.data, **options)
            epoch, first = epoch + 1, 0

    def train_step(self, batch: SequenceBatch) -> dict[str, float]:
        """One step; returns the losses of the whole batch and the rate, of which those are NaN without targets."""
        self.parallel.train()
        rate = self.scheduler.get_last_lr()[0]
        batch = batch.to(self.device, non_blocking=True)
        with self._autocast():
            losses, number, states = self.parallel(batch, self.states)
        self.states = detach(states)
        values = dict.fromkeys(self.task.losses, float("nan"))
        if losses is not None:
            # Losses are means over each process's number, gradients will be averaged over the processes.
            share = number.clamp(min=1) * processes.count() / processes.total(number).clamp(min=1)
            self.optimizer.zero_grad()
            self.scaler.scale(losses["loss"] * share).backward()
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip_val)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            means = torch.stack([losses[name].detach() * share for name in self.task.losses])
            values = dict(zip(values, (processes.total(means) / processes.count()).tolist(), strict=True))
        self.scheduler.step()
        self.step += 1
        return {"step": self.step, **values, "learning_rate": rate}

    def validate(self) -> dict[str, float]:
        """The task's measures on the validation recordings; computed by the first process, the others wait."""
        result = {}
        if processes.rank() == 0:
            self.task.eval()
            options = {"num_workers": self.settings.workers, "generator": torch.Generator()}
            loader = DataLoader(self.validation, batch_size=None, **options)
            with self._autocast():
                result = self.task.validate(batch.to(self.device) for batch in loader)
        return {"step": self.step, **processes.gathered(result)[0]}

    def save(self, path: Path) -> None:
        """Writes a checkpoint, which appears under its name only when it is whole. All processes must call it."""
        states = processes.gathered(tree_map_only(Tensor, Tensor.cpu, self.states))
        random = processes.gathered(_random_state(self.device))
        if processes.rank() == 0:
            state = {
                "state_dict": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(),
                "states": None if states[0] is None else tree_map(lambda *parts: torch.cat(parts), *states),
                "step": self.step,
                "best": self.best,
                "random": random,
                "settings": self.settings.as_dict(),
            }
            files.write(path, partial(torch.save, state))
        processes.wait()

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint of `save`, also with another number of processes.

        Raises:
            ValueError: if it is none, or of a run with other settings.
        """
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            settings = dict(state["settings"])
        except Exception as error:
            raise ValueError(f"{path}: expected a checkpoint of this command, got: {error!r}") from error
        differing = [key for key, value in self.settings.as_dict().items() if settings.get(key) != value]
        if set(differing) - {"workers", "validate_every", "checkpoint_every", "tensorboard"}:
            raise ValueError(f"{path}: expected the settings of this run, got another {', '.join(differing)}")
        for name in ("optimizer", "scheduler", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.model.load_state_dict(state["state_dict"])
        share, rank = self.settings.batch_size // processes.count(), processes.rank()
        mine = slice(rank * share, (rank + 1) * share)
        self.states = tree_map_only(Tensor, lambda value: value[mine].clone(), state["states"])
        self.step, self.best = state["step"], state["best"]
        if len(state["random"]) == processes.count():
            _set_random_state(state["random"][rank], self.device)

    def _autocast(self) -> torch.autocast:
        precision = self.settings.precision
        options = {"enabled": False} if precision == "float32" else {"dtype": getattr(torch, precision)}
        return torch.autocast(self.device.type, **options)


def _every(settings: Settings) -> int | None:
    """How far apart random sequences begin: with boxes they end at labelled frames."""
    return None if isinstance(settings, DetectorSettings) else 1


def _rate(step: int, steps: int, warmup: float) -> float:
    """Share of the learning rate: up over the first `warmup` of the steps, down over the rest, linearly."""
    rising = max(1.0, warmup * steps)
    return min((step + 1) / rising, max(0.0, (steps - step) / max(1.0, steps - rising)), 1.0)


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0].cpu())
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1].cpu(), device)
