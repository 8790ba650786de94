"""Boxes: intersection over union, and detections from the head's predictions by non-maximum suppression."""

import torch
from torch import Tensor


def corners(boxes: Tensor) -> Tensor:
    """Centre x, y, width, height [..., 4] to left, top, right, bottom."""
    centre, size = boxes.split(2, dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union [A, B] of boxes given by their corners, [A, 4] and [B, 4]."""
    overlap = (torch.min(a[:, None, 2:], b[:, 2:]) - torch.max(a[:, None, :2], b[:, :2])).clamp(min=0).prod(dim=-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(dim=-1) for boxes in (a, b)]
    return overlap / (areas[0][:, None] + areas[1] - overlap).clamp(min=1e-16)


def postprocess(predictions: Tensor, confidence_threshold: float = 0.1, nms_threshold: float = 0.45) -> list[Tensor]:
    """The detections of every image: confident predictions that no more confident one of their class overlaps.

    Args:
        predictions: [N, A, 5 + classes] of YOLOXHead; not modified.
        confidence_threshold: Least objectness times class probability. 0.001 for evaluation, 0.1 for pictures.
        nms_threshold: Intersection over union above which the less confident of two boxes of a class goes.

    Returns:
        One tensor [D, 7] per image, the most confident first: left, top, right, bottom in pixels, objectness, class
        probability, class.
    """
    if predictions.dim() != 3 or predictions.shape[2] < 6:
        raise ValueError(f"predictions must be [N, A, 5 + classes], got {tuple(predictions.shape)}")
    detections = []
    for image in predictions.detach():
        probability, label = image[:, 5:].max(dim=1)
        confidence = image[:, 4] * probability
        kept = (confidence >= confidence_threshold).nonzero()[:, 0]
        kept = kept[confidence[kept].argsort(descending=True, stable=True)]
        boxes = corners(image[kept, :4])
        rows = torch.cat([boxes, torch.stack([image[kept, 4], probability[kept], label[kept].float()], dim=1)], dim=1)
        detections.append(rows[suppressed(boxes, label[kept], nms_threshold)])
    return detections


def suppressed(boxes: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Indices [K] of the boxes that stay; `boxes` are corners [D, 4] in the order of their confidence."""
    remaining, kept = torch.arange(len(boxes), device=boxes.device), []
    while len(remaining):
        first, remaining = remaining[0], remaining[1:]
        kept.append(first)
        overlaps = pairwise_iou(boxes[first][None], boxes[remaining])[0] > threshold
        remaining = remaining[~(overlaps & (labels[remaining] == labels[first]))]
    return torch.stack(kept) if kept else remaining
