"""YOLOX's loss: which anchors answer for which object (SimOTA), and what they are charged.

Source: Ge et al. 2021 (arXiv:2107.08430), section 2.1 "SimOTA", with the constants of its published code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from evkernels.models.rvt.boxes import corners, pairwise_iou

# An anchor may answer for an object if its centre is within so many strides of the object's, in x and in y.
CENTRE_RADIUS = 1.5
# The objects' numbers of anchors are the sums of their so many best overlaps.
CANDIDATES = 10
BOX_WEIGHT = 5.0


def yolox_losses(
    boxes: Tensor, objectness: Tensor, class_logits: Tensor, anchors: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """The losses of a batch.

    Args:
        boxes: Predicted centre x, y, width, height in pixels [N, A, 4].
        objectness: Logits [N, A].
        class_logits: [N, A, classes].
        anchors: Column, row and stride of every anchor [A, 3].
        targets: (class, centre x, centre y, width, height) [N, M, 5], filled up with rows of zeros.

    Returns:
        Scalars: "loss" is the sum of "iou_loss" (5 * (1 - IoU^2)), "conf_loss" and "cls_loss" (binary cross entropies),
        each per matched anchor of the whole batch; "matched" is the number of those, and "num_fg" that per object.
    """
    if targets.dim() != 3 or targets.shape[2] != 5 or len(targets) != len(boxes):
        raise ValueError(f"targets must be [N, M, 5] with N = {len(boxes)}, got {tuple(targets.shape)}")
    # Small differences of logits decide the assignment: 16 bits are too few.
    boxes, objectness, class_logits, targets = (v.float() for v in (boxes, objectness, class_logits, targets))
    is_foreground = torch.zeros_like(objectness, dtype=torch.bool)
    box_losses, class_losses, objects = [], [], 0
    for n, target in enumerate(targets):
        target = target[target.sum(dim=1) > 0]
        objects += len(target)
        anchor, owner, overlap = assigned(boxes[n], objectness[n], class_logits[n], anchors, target)
        is_foreground[n, anchor] = True
        box_losses.append(1 - _paired_iou(boxes[n, anchor], target[owner, 1:]) ** 2)
        wanted = F.one_hot(target[owner, 0].long(), class_logits.shape[2]) * overlap[:, None]
        class_losses.append(F.binary_cross_entropy_with_logits(class_logits[n, anchor], wanted, reduction="none"))
    matched = is_foreground.sum()
    number = matched.clamp(min=1)
    # Nothing of the boxes for a batch of no images, but with a gradient.
    nothing = boxes[:0].sum()
    losses = {
        "iou_loss": BOX_WEIGHT * sum((value.sum() for value in box_losses), nothing) / number,
        "conf_loss": F.binary_cross_entropy_with_logits(objectness, is_foreground.float(), reduction="sum") / number,
        "cls_loss": sum((value.sum() for value in class_losses), class_logits[:0].sum()) / number,
    }
    return {"loss": sum(losses.values()), **losses, "matched": matched, "num_fg": number / max(objects, 1)}


@torch.no_grad()
def assigned(
    boxes: Tensor, objectness: Tensor, class_logits: Tensor, anchors: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """SimOTA of one image: anchors [F] that answer for an object, the object of each, and their overlap.

    An object gets the k anchors of least cost among those near any object, k being the sum of its ten best overlaps;
    an anchor wanted by several answers for the cheapest.
    """
    # [M, A]: near is the anchor's centre within the radius of the object's.
    centres = (anchors[:, :2] + 0.5) * anchors[:, 2:]
    near = ((centres - target[:, None, 1:3]).abs() < CENTRE_RADIUS * anchors[:, 2:]).all(dim=-1)
    candidates = near.any(dim=0).nonzero()[:, 0]
    if len(candidates) == 0:
        return candidates, candidates, objectness.new_zeros(0)
    near, objectness, class_logits = near[:, candidates], objectness[candidates], class_logits[candidates]
    overlaps = pairwise_iou(corners(target[:, 1:]), corners(boxes[candidates]))
    confidence = (class_logits.sigmoid() * objectness.sigmoid()[:, None]).sqrt()
    one_hot = F.one_hot(target[:, 0].long(), class_logits.shape[1]).float()
    class_cost = F.binary_cross_entropy(
        confidence.expand(len(target), -1, -1), one_hot[:, None].expand(-1, len(candidates), -1), reduction="none"
    ).sum(dim=-1)
    cost = class_cost - 3 * (overlaps + 1e-8).log() + 1e6 * ~near
    best = overlaps.topk(min(CANDIDATES, len(candidates)), dim=1).values.sum(dim=1).int().clamp(min=1)
    wanted = torch.zeros_like(near)
    for row, count in enumerate(best.tolist()):
        wanted[row, cost[row].topk(count, largest=False).indices] = True
    disputed = wanted.sum(dim=0) > 1
    wanted[:, disputed] = False
    wanted[cost[:, disputed].argmin(dim=0), disputed.nonzero()[:, 0]] = True
    chosen = wanted.any(dim=0).nonzero()[:, 0]
    owner = wanted[:, chosen].int().argmax(dim=0)
    return candidates[chosen], owner, overlaps[owner, chosen]


def _paired_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union [F] of boxes [F, 4] and [F, 4] given by centre and size."""
    a, b = corners(a), corners(b)
    overlap = (torch.min(a[:, 2:], b[:, 2:]) - torch.max(a[:, :2], b[:, :2])).clamp(min=0).prod(dim=1)
    areas = (a[:, 2:] - a[:, :2]).prod(dim=1) + (b[:, 2:] - b[:, :2]).prod(dim=1)
    return overlap / (areas - overlap + 1e-16)
