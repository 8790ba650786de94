"""Average precision of detections, by pycocotools, on boxes of labelled frames."""

from __future__ import annotations

import contextlib
import io

import numpy as np
from torch import Tensor


class AveragePrecision:
    """Collects detections and boxes of frames; COCO's average precisions of all of them.

    Args:
        num_classes: Number of classes.
    """

    def __init__(self, num_classes: int) -> None:
        self._categories = [{"id": label, "name": str(label)} for label in range(num_classes)]
        self._images: list[dict] = []
        self._truth: list[dict] = []
        self._found: list[dict] = []

    def add(self, detections: Tensor, boxes: Tensor) -> None:
        """A frame: detections [D, 7] of `evkernels.models.rvt.postprocess`, and true boxes [L, 6] of SequenceBatch."""
        image = len(self._images) + 1
        self._images.append({"id": image})
        for x, y, width, height, label, _ in boxes.tolist():
            self._truth.append(
                {
                    "id": len(self._truth) + 1,
                    "image_id": image,
                    "category_id": int(label),
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
        for left, top, right, bottom, objectness, probability, label in detections.tolist():
            self._found.append(
                {
                    "image_id": image,
                    "category_id": int(label),
                    "bbox": [left, top, right - left, bottom - top],
                    "score": objectness * probability,
                }
            )

    def result(self) -> dict[str, float]:
        """The mean "AP" over overlaps 0.5 to 0.95, "AP50" and "AP75"; 0 without detections, NaN without true boxes."""
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        if not self._truth:
            return dict.fromkeys(("AP", "AP50", "AP75"), float("nan"))
        if not self._found:
            return dict.fromkeys(("AP", "AP50", "AP75"), 0.0)
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = {"images": self._images, "annotations": self._truth, "categories": self._categories}
            truth.createIndex()
            evaluation = COCOeval(truth, truth.loadRes(self._found), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return dict(zip(("AP", "AP50", "AP75"), map(float, np.asarray(evaluation.stats[:3])), strict=True))
