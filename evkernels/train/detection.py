"""Training RVT's detector: boxes of labelled frames as targets, average precision as measure."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from evkernels.data import SequenceBatch
from evkernels.models.rvt import RVTDetector, postprocess
from evkernels.train import processes
from evkernels.train.evaluation import AveragePrecision
from evkernels.train.settings import DetectorSettings

State = list[tuple[Tensor, Tensor]]


class Detection(nn.Module):
    """RVT's detector with its loss.

    Args:
        settings: Of the run.
        shape: Channels, height and width of the frames.
    """

    losses = ("loss", "iou_loss", "conf_loss", "cls_loss")
    measure = "AP"

    def __init__(self, settings: DetectorSettings, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.settings = settings
        channels, height, width = shape
        given = {"num_classes": settings.num_classes, "input_channels": channels}
        if "size" not in settings.model:
            self.network = RVTDetector.from_config(settings.model, height, width, **given)
            return
        try:
            self.network = RVTDetector.published(height=height, width=width, **given, **settings.model)
        except TypeError as error:
            raise ValueError(f"model: {error}") from error

    def forward(self, batch: SequenceBatch, states: State | None) -> tuple[dict[str, Tensor] | None, Tensor, State]:
        """Mean losses, None where no process has labels, the number that they are means over, and the next states."""
        labelled = batch.labelled
        detect = bool(processes.total(labelled.sum()))
        _, losses, states = self.network.forward_sequence(
            batch.frames, states, batch.reset, labelled, targets_of(batch), retrieve_detections=detect
        )
        number = labelled.sum() if losses is None else losses["matched"]
        return losses, number, states

    @torch.no_grad()
    def validate(self, batches: Iterable[SequenceBatch]) -> dict[str, float]:
        """Average precisions on recordings that are streamed from their beginnings."""
        states, precision = None, AveragePrecision(self.settings.num_classes)
        for batch in batches:
            predictions, _, states = self.network.forward_sequence(
                batch.frames, states, batch.reset, batch.labelled, retrieve_detections=batch.labelled.any()
            )
            if predictions is None:
                continue
            thresholds = self.settings.confidence_threshold, self.settings.nms_threshold
            frames = batch.labelled.nonzero().tolist()
            for frame, detections in zip(frames, postprocess(predictions.float(), *thresholds), strict=True):
                precision.add(detections, batch.boxes_of(*frame))
        return precision.result()


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
