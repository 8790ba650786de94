"""RVT's boxes: suppression, overlap, assignment and loss against plain loops."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from evkernels.models.rvt import loss, postprocess
from evkernels.models.rvt.boxes import corners, pairwise_iou


def random_boxes(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 4, generator=generator) * torch.tensor([100, 60, 40, 40]) + torch.tensor([0, 0, 4, 4])


def test_suppression_equals_a_plain_loop():
    generator = torch.Generator().manual_seed(2)
    predictions = torch.cat([random_boxes(60, 1), torch.rand(60, 4, generator=generator)], dim=1)[None]
    before = predictions.clone()
    (detections,) = postprocess(predictions, 0.1, 0.3)
    scores = predictions[0, :, 4] * predictions[0, :, 5:].max(dim=1).values
    kept = []
    for index in scores.argsort(descending=True).tolist():
        label = predictions[0, index, 5:].argmax()
        box = corners(predictions[0, index, :4])[None]
        rivals = [k for k in kept if predictions[0, k, 5:].argmax() == label]
        if scores[index] >= 0.1 and all(pairwise_iou(box, corners(predictions[0, k, :4])[None]) <= 0.3 for k in rivals):
            kept.append(index)
    assert 5 < len(kept) < 60
    torch.testing.assert_close(detections[:, :4], corners(predictions[0, kept, :4]))
    torch.testing.assert_close(detections[:, 4] * detections[:, 5], scores[kept])
    assert torch.equal(predictions, before)
    assert postprocess(predictions, 2.0)[0].shape == (0, 7)
    assert len(postprocess(predictions, scores.max().item())[0]) == 1


def test_intersection_over_union():
    a = torch.tensor([[0.0, 0, 2, 2], [1, 1, 1, 1]])
    b = torch.tensor([[1.0, 0, 3, 2], [5, 5, 6, 6]])
    torch.testing.assert_close(pairwise_iou(a, b), torch.tensor([[1 / 3, 0], [0, 0]]))


def plain_assignment(boxes, objectness, class_logits, anchors, target) -> dict[int, int]:
    """SimOTA with loops: {anchor: object}."""
    near = {
        (m, a)
        for m, a in itertools.product(range(len(target)), range(len(anchors)))
        if all(abs((anchors[a, d] + 0.5) * anchors[a, 2] - target[m, 1 + d]) < 1.5 * anchors[a, 2] for d in (0, 1))
    }
    candidates = sorted({a for _, a in near})
    ious = pairwise_iou(corners(target[:, 1:]), corners(boxes))
    cost = {}
    for m, a in itertools.product(range(len(target)), candidates):
        probability = (class_logits[a].sigmoid() * objectness[a].sigmoid()).sqrt()
        wanted = F.one_hot(target[m, 0].long(), class_logits.shape[1]).float()
        entropy = F.binary_cross_entropy(probability, wanted, reduction="sum")
        cost[m, a] = float(entropy - 3 * torch.log(ious[m, a] + 1e-8)) + (0 if (m, a) in near else 1e6)
    owners: dict[int, list[int]] = {}
    for m in range(len(target)):
        best = sorted((float(ious[m, a]) for a in candidates), reverse=True)[:10]
        for a in sorted(candidates, key=lambda a, m=m: cost[m, a])[: max(1, int(sum(best)))]:
            owners.setdefault(a, []).append(m)
    return {
        a: ms[0] if len(ms) == 1 else min(range(len(target)), key=lambda m, a=a: cost[m, a]) for a, ms in owners.items()
    }


# The second object is close enough to want the same anchors, or far, and an anchor near the first sees it best.
@pytest.mark.parametrize(("seed", "second"), [(0, (25, 22)), (1, (25, 22)), (2, (25, 22)), (3, (52, 12))])
def test_assignment_equals_plain_loops(seed, second):
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.tensor([[x, y, 8] for y in range(5) for x in range(8)], dtype=torch.float32)
    centres = (anchors[:, :2] + 0.5) * 8
    boxes = torch.cat(
        [centres + 4 * torch.randn(40, 2, generator=generator), 8 + 16 * torch.rand(40, 2, generator=generator)], dim=1
    )
    objectness, logits = torch.randn(40, generator=generator), torch.randn(40, 3, generator=generator)
    target = torch.tensor([[0, 20, 20, 16, 20], [2, *second, 20, 18]], dtype=torch.float32)
    if second == (52, 12):
        boxes[18] = target[1, 1:]
    anchor, owner, overlap = loss.assigned(boxes, objectness, logits, anchors, target)
    expected = plain_assignment(boxes, objectness, logits, anchors, target)
    assert set(expected.values()) == {0, 1}
    assert dict(zip(anchor.tolist(), owner.tolist(), strict=True)) == expected
    ious = pairwise_iou(corners(target[:, 1:]), corners(boxes))
    torch.testing.assert_close(overlap, ious[owner, anchor])


def test_a_perfect_prediction_costs_nothing():
    anchors = torch.tensor([[x, 0, 8] for x in range(8)], dtype=torch.float32)
    boxes = torch.tensor([[4.0 + 8 * x, 4, 8, 8] for x in range(8)])[None]
    targets = torch.tensor([[[1.0, 20, 4, 8, 8]]])
    objectness, logits = torch.full((1, 8), -40.0), torch.full((1, 8, 2), -40.0)
    objectness[0, 2], logits[0, 2, 1] = 40, 40
    losses = loss.yolox_losses(boxes, objectness, logits, anchors, targets)
    assert losses["loss"].item() == pytest.approx(0, abs=1e-5)
    assert losses["num_fg"] == 1
    # Half a box aside: overlaps of all anchors add up to a third, and yet one answers.
    boxes[0, 2, 0] += 4
    losses = loss.yolox_losses(boxes, objectness, logits, anchors, targets)
    assert losses["matched"] == 1
    assert losses["iou_loss"].item() == pytest.approx(5 * (1 - 1 / 9), rel=1e-5)
