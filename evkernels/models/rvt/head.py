"""YOLOX's decoupled head: per position of three maps a box, an objectness and class scores; its loss in training."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from evkernels.models.rvt import loss
from evkernels.models.rvt.fpn import BaseConv


class YOLOXHead(nn.Module):
    """Boxes and scores at every position ("anchor") of the maps.

    Args:
        num_classes: Number of classes.
        strides: Pixels per position of each map.
        in_channels: Channels of each map. The head's own width is a quarter of the last.

    Forward: (maps [N, C, H, W] each; targets [N, M, 5] or None) to (predictions [N, A, 5 + num_classes], losses or
    None), A being all positions of all maps, finest first. A prediction is centre x, y, width, height in pixels of the
    input, the probability of an object, and those of the classes. Targets are rows (class, centre x, centre y, width,
    height), filled up with rows of zeros; with them the losses are those of `loss.yolox_losses`.

    State dict: `stems`, `cls_convs`, `reg_convs`, `cls_preds`, `reg_preds`, `obj_preds`, a list of one per map each.
    Source: Ge et al. 2021 (arXiv:2107.08430), in the sizes of RVT.
    """

    def __init__(
        self,
        num_classes: int,
        strides: Sequence[int] = (8, 16, 32),
        in_channels: Sequence[int] = (128, 256, 512),
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        self.strides = tuple(strides)
        width = in_channels[-1] // 4
        self.stems = nn.ModuleList(BaseConv(channels, width, 1) for channels in in_channels)
        self.cls_convs = nn.ModuleList(_tower(width) for _ in in_channels)
        self.reg_convs = nn.ModuleList(_tower(width) for _ in in_channels)
        self.cls_preds = nn.ModuleList(nn.Conv2d(width, num_classes, 1) for _ in in_channels)
        self.reg_preds = nn.ModuleList(nn.Conv2d(width, 4, 1) for _ in in_channels)
        self.obj_preds = nn.ModuleList(nn.Conv2d(width, 1, 1) for _ in in_channels)
        # One anchor in a hundred is an object to begin with.
        for prediction in (*self.cls_preds, *self.obj_preds):
            nn.init.constant_(prediction.bias, -math.log(99))

    def forward(self, maps: Sequence[Tensor], targets: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        rows, centres = [], []
        for level, x in enumerate(maps):
            x = self.stems[level](x)
            towers = self.reg_convs[level](x), self.cls_convs[level](x)
            row = torch.cat(
                [self.reg_preds[level](towers[0]), self.obj_preds[level](towers[0]), self.cls_preds[level](towers[1])],
                dim=1,
            )
            rows.append(row.flatten(2).transpose(1, 2))
            centres.append(_positions(*x.shape[-2:], self.strides[level], row))
        raw, anchors = torch.cat(rows, dim=1), torch.cat(centres)
        boxes = _decoded(raw[..., :4], anchors)
        losses = None if targets is None else loss.yolox_losses(boxes, raw[..., 4], raw[..., 5:], anchors, targets)
        return torch.cat([boxes, raw[..., 4:].sigmoid()], dim=-1), losses


def _tower(width: int) -> nn.Sequential:
    return nn.Sequential(*(BaseConv(before, after, 3) for before, after in pairwise([width] * 3)))


def _positions(height: int, width: int, stride: int, like: Tensor) -> Tensor:
    """Column, row and stride of every position of a map [height * width, 3], row by row."""
    y, x = torch.meshgrid(*(torch.arange(size, device=like.device) for size in (height, width)), indexing="ij")
    return torch.stack([x, y, torch.full_like(x, stride)], dim=-1).flatten(0, 1).to(torch.float32)


def _decoded(raw: Tensor, anchors: Tensor) -> Tensor:
    """Offsets from an anchor's corner and logarithms of sizes [N, A, 4], in strides, to boxes in pixels, in float32."""
    raw, stride = raw.float(), anchors[:, 2:]
    return torch.cat([(raw[..., :2] + anchors[:, :2]) * stride, raw[..., 2:].exp() * stride], dim=-1)
