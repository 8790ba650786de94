"""YOLOX's path aggregation network over three maps of the backbone, with its building blocks; published keys."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evkernels.nn.convolution import convolved


class BaseConv(nn.Module):
    """Convolution without bias, batch norm, SiLU; padded so that stride 1 keeps the size."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, (kernel_size - 1) // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(convolved(self.conv, x)))


class Bottleneck(nn.Module):
    """1x1, then 3x3; no shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = BaseConv(channels, channels, 1)
        self.conv2 = BaseConv(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class CSPLayer(nn.Module):
    """`conv3(cat(m(conv1(x)), conv2(x)))` with half the channels inside and `m` a row of bottlenecks."""

    def __init__(self, in_channels: int, out_channels: int, bottlenecks: int) -> None:
        super().__init__()
        hidden = out_channels // 2
        self.conv1 = BaseConv(in_channels, hidden, 1)
        self.conv2 = BaseConv(in_channels, hidden, 1)
        self.conv3 = BaseConv(2 * hidden, out_channels, 1)
        self.m = nn.Sequential(*(Bottleneck(hidden) for _ in range(bottlenecks)))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(torch.cat([self.m(self.conv1(x)), self.conv2(x)], dim=1))


class YOLOPAFPN(nn.Module):
    """Three maps of the backbone, mixed from coarse to fine and back.

    Args:
        in_channels: Channels of the three maps, finest first.
        in_stages: Which stages of the backbone they come from, finest first.
        depth: 3 * depth, rounded, is the number of bottlenecks of a CSP layer: 0.67 in RVT-B, 0.33 in RVT-S and -T.

    Raises:
        ValueError: if there are not three stages.

    Forward: {stage: [N, C, H, W]}, each map half the size of the one before, to three maps of those sizes and channels.
    State dict: `lateral_conv0`, `C3_p4`, `reduce_conv1`, `C3_p3`, `bu_conv2`, `C3_n3`, `bu_conv1`, `C3_n4`.
    Source: Ge et al. 2021 (arXiv:2107.08430), as RVT takes it, with nearest upsampling.
    """

    def __init__(
        self, in_channels: Sequence[int] = (128, 256, 512), in_stages: Sequence[int] = (2, 3, 4), depth: float = 0.67
    ) -> None:
        super().__init__()
        if len(in_channels) != 3 or len(in_stages) != 3:
            raise ValueError(f"in_channels and in_stages must be of length 3, got {in_channels} and {in_stages}")
        fine, middle, coarse = in_channels
        bottlenecks = round(3 * depth)
        self.in_stages = tuple(in_stages)
        self.lateral_conv0 = BaseConv(coarse, middle, 1)
        self.C3_p4 = CSPLayer(2 * middle, middle, bottlenecks)
        self.reduce_conv1 = BaseConv(middle, fine, 1)
        self.C3_p3 = CSPLayer(2 * fine, fine, bottlenecks)
        self.bu_conv2 = BaseConv(fine, fine, 3, stride=2)
        self.C3_n3 = CSPLayer(2 * fine, middle, bottlenecks)
        self.bu_conv1 = BaseConv(middle, middle, 3, stride=2)
        self.C3_n4 = CSPLayer(2 * middle, coarse, bottlenecks)

    def forward(self, maps: Mapping[int, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        fine, middle, coarse = (maps[stage] for stage in self.in_stages)
        lateral = self.lateral_conv0(coarse)
        reduced = self.reduce_conv1(self.C3_p4(torch.cat([_doubled(lateral), middle], dim=1)))
        fine = self.C3_p3(torch.cat([_doubled(reduced), fine], dim=1))
        middle = self.C3_n3(torch.cat([self.bu_conv2(fine), reduced], dim=1))
        coarse = self.C3_n4(torch.cat([self.bu_conv1(middle), lateral], dim=1))
        return fine, middle, coarse


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest-exact")
