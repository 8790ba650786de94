"""The training loop of a recurrent detector: truncated backpropagation over sequences that go on, step by step.

One step is one batch of sequences. The network's state is carried from batch to batch and reset where the data say
that a recording begins; it belongs to the checkpoint like the weights do, and so a resumed run computes the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from evkernels.data import RandomSequences, SequenceBatch, StreamingSequences, collate
from evkernels.models.rvt import RVTDetector, postprocess
from evkernels.nn import detach
from evkernels.train.evaluation import AveragePrecision
from evkernels.train.settings import Settings


class Trainer:
    """A detector, its optimiser and data; `step` counts the steps taken.

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
        kind = {"representation": settings.representation, "downsample": settings.downsample}
        if settings.sampling == "stream":
            self.data = StreamingSequences(
                settings.train, settings.length, settings.batch_size, shuffle=True, seed=settings.seed, **kind
            )
        else:
            self.data = RandomSequences(settings.train, settings.length, **kind)
        self.validation = StreamingSequences(settings.validate, settings.length, settings.batch_size, **kind)
        self.model = _network(settings, self.data.recordings[0].shape).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: _rate(step, settings.steps, settings.warmup)
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")
        self.states: list[tuple[Tensor, Tensor]] | None = None
        self.step = 0
        self.best = 0.0

    def batches(self) -> Iterator[SequenceBatch]:
        """Batches without end, from that of the next step on."""
        streams = self.settings.sampling == "stream"
        per_epoch = len(self.data) if streams else max(1, len(self.data) // self.settings.batch_size)
        epoch, first = divmod(self.step, per_epoch)
        while True:
            options: dict[str, Any] = {"num_workers": self.settings.workers, "pin_memory": self.device.type == "cuda"}
            if streams:
                self.data.set_epoch(epoch)
                options |= {"batch_size": None, "sampler": range(first, per_epoch)}
            else:
                generator = torch.Generator().manual_seed(self.settings.seed + epoch)
                order = torch.randperm(len(self.data), generator=generator).split(self.settings.batch_size)
                chosen = [rows.tolist() for rows in order[first:per_epoch]]
                options |= {"batch_sampler": chosen, "collate_fn": collate}
            yield from DataLoader(self.data, **options)
            epoch, first = epoch + 1, 0

    def train_step(self, batch: SequenceBatch) -> dict[str, float]:
        """One step; returns the losses and the rate, of which those are NaN where no frame has labels."""
        self.model.train()
        rate = self.scheduler.get_last_lr()[0]
        batch = batch.to(self.device, non_blocking=True)
        labelled = batch.labelled
        losses = None
        with torch.autocast(self.device.type, **self._autocast()):
            _, losses, states = self.model.forward_sequence(
                batch.frames, self.states, batch.reset, labelled, targets_of(batch), retrieve_detections=labelled.any()
            )
        self.states = detach(states)
        if losses is not None:
            self.optimizer.zero_grad()
            self.scaler.scale(losses["loss"]).backward()
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.gradient_clip_val)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.scheduler.step()
        self.step += 1
        names = ("loss", "iou_loss", "conf_loss", "cls_loss")
        values = {name: float("nan") if losses is None else losses[name].item() for name in names}
        return {"step": self.step, **values, "learning_rate": rate}

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Average precisions on the validation recordings, streamed from their beginnings."""
        self.model.eval()
        states, precision = None, AveragePrecision(self.settings.num_classes)
        for batch in DataLoader(self.validation, batch_size=None, num_workers=self.settings.workers):
            batch = batch.to(self.device)
            with torch.autocast(self.device.type, **self._autocast()):
                predictions, _, states = self.model.forward_sequence(
                    batch.frames, states, batch.reset, batch.labelled, retrieve_detections=batch.labelled.any()
                )
            if predictions is None:
                continue
            thresholds = self.settings.confidence_threshold, self.settings.nms_threshold
            frames = batch.labelled.nonzero().tolist()
            for frame, detections in zip(frames, postprocess(predictions.float(), *thresholds), strict=True):
                precision.add(detections, batch.boxes_of(*frame))
        return {"step": self.step, **precision.result()}

    def save(self, path: Path) -> None:
        """Writes a checkpoint, which appears under its name only when it is whole."""
        state = {
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "states": self.states,
            "step": self.step,
            "best": self.best,
            "random": torch.get_rng_state(),
            "settings": self.settings.as_dict(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint of `save`.

        Raises:
            ValueError: if it is none, or of a run with other settings.
        """
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:
            raise ValueError(f"{path}: expected a checkpoint, got: {error}") from error
        differing = [key for key, value in self.settings.as_dict().items() if state["settings"].get(key) != value]
        if set(differing) - {"workers", "validate_every", "checkpoint_every"}:
            raise ValueError(f"{path}: expected the settings of this run, got another {', '.join(differing)}")
        for name in ("optimizer", "scheduler", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        self.model.load_state_dict(state["state_dict"])
        self.states, self.step, self.best = state["states"], state["step"], state["best"]
        torch.set_rng_state(state["random"].cpu())

    def _autocast(self) -> dict[str, Any]:
        precision = self.settings.precision
        return {"enabled": False} if precision == "float32" else {"dtype": getattr(torch, precision)}


def _rate(step: int, steps: int, warmup: float) -> float:
    """Share of the learning rate: up over the first `warmup` of the steps, down over the rest, linearly."""
    rising = max(1.0, warmup * steps)
    return min((step + 1) / rising, max(0.0, (steps - step) / max(1.0, steps - rising)), 1.0)


def _network(settings: Settings, shape: tuple[int, int, int]) -> RVTDetector:
    channels, height, width = shape
    given = {"num_classes": settings.num_classes, "input_channels": channels}
    if "size" not in settings.model:
        return RVTDetector.from_config(settings.model, height, width, **given)
    try:
        return RVTDetector.published(height=height, width=width, **given, **settings.model)
    except TypeError as error:
        raise ValueError(f"model: {error}") from error


def targets_of(batch: SequenceBatch) -> Tensor:
    """Boxes of the labelled frames as YOLOXHead takes them: (class, centre x, centre y, width, height) [K, M, 5]."""
    rows = torch.full(batch.labelled.shape, -1, device=batch.labelled.device)
    rows[batch.labelled] = torch.arange(int(batch.labelled.sum()), device=rows.device)
    frame = rows[batch.box_frames[:, 0], batch.box_frames[:, 1]]
    counts = torch.bincount(frame, minlength=int(batch.labelled.sum()))
    # Boxes come frame by frame, so a box's place within its frame is its own less that of the frame's first.
    place = torch.arange(len(frame), device=frame.device) - (counts.cumsum(0) - counts)[frame]
    targets = batch.boxes.new_zeros(len(counts), int(counts.max()) if len(counts) else 0, 5)
    position, size, label = batch.boxes[:, :2], batch.boxes[:, 2:4], batch.boxes[:, 4:5]
    targets[frame, place] = torch.cat([label, position + size / 2, size], dim=1)
    return targets
