"""Sequences of frames with boxes as tensors: boxes of all frames in one, with the frame of each beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SequenceBatch:
    """N sequences of T frames.

    Args:
        frames: [T, N, C, H, W] in the dtype of the files; zeros where there is no frame.
        reset: bool [T, N]: the state of a recurrent network is to be zero before this step, because another recording
            begins. What `reset` of the layers in `evkernels.nn` takes.
        padding: bool [T, N]: there is no frame, because the recording has ended.
        times: End of the frame's window in microseconds, int64 [T, N], 0 for padding.
        labelled: bool [T, N]: the frame was looked at for boxes.
        boxes: float32 [L, 6]: left, top, width, height in pixels of the frame, class, confidence.
        box_frames: Step and sample of each box, int64 [L, 2], in order of step, then sample.
        targets: Maps [T, N, H, W], float32 and NaN for padding, where the data set was asked for them.
    """

    frames: Tensor
    reset: Tensor
    padding: Tensor
    times: Tensor
    labelled: Tensor
    boxes: Tensor
    box_frames: Tensor
    targets: Tensor | None = None

    def __len__(self) -> int:
        """The number of sequences."""
        return self.frames.shape[1]

    @property
    def lengths(self) -> Tensor:
        """How many frames each sequence has, int64 [N]: what `lengths` of the layers in `evkernels.nn` takes."""
        return (~self.padding).sum(0)

    def boxes_of(self, step: int, sample: int) -> Tensor:
        """The boxes of one frame, float32 [L', 6]."""
        chosen = (self.box_frames == self.box_frames.new_tensor([step, sample])).all(1)
        return self.boxes[chosen]

    def to(self, device: str | torch.device, non_blocking: bool = False) -> SequenceBatch:
        """The batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> SequenceBatch:
        """The batch in page-locked memory; torch's DataLoader calls it when told to pin."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> SequenceBatch:
        values = (getattr(self, field.name) for field in fields(self))
        return SequenceBatch(*(None if value is None else change(value) for value in values))


def collate(samples: Sequence[SequenceBatch]) -> SequenceBatch:
    """One batch of several, for torch's DataLoader: `DataLoader(dataset, batch_size=8, collate_fn=collate)`.

    Raises:
        ValueError: if the sequences differ in length or the frames in size.
    """
    shapes = {(sample.frames.shape[0], *sample.frames.shape[2:]) for sample in samples}
    if len(shapes) != 1:
        raise ValueError(
            f"sequences must have frames [T, C, H, W] of one shape, got {sorted(shapes) or 'no sequences'}"
        )
    frames, reset, padding, times, labelled = (
        torch.cat([getattr(sample, name) for sample in samples], dim=1)
        for name in ("frames", "reset", "padding", "times", "labelled")
    )
    first = 0
    moved = []
    for sample in samples:
        moved.append(sample.box_frames + sample.box_frames.new_tensor([0, first]))
        first += len(sample)
    boxes, box_frames = torch.cat([sample.boxes for sample in samples]), torch.cat(moved)
    order = torch.argsort(box_frames[:, 0] * first + box_frames[:, 1], stable=True)
    targets = [sample.targets for sample in samples]
    targets = None if None in targets else torch.cat(targets, dim=1)
    return SequenceBatch(frames, reset, padding, times, labelled, boxes[order], box_frames[order], targets)
