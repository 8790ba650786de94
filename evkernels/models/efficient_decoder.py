"""EfficientConvLSTM's way up from the bottleneck: four levels and a head of convolutions, batch norms and GELUs.

Maps are best channels_last, in which the library's convolutions of few channels take half the time. In evaluation the
norms go into the convolutions' weights, and 3x3 convolution and GELU are one op where that is faster. In training norm
and GELU are one op, in the head with the projection to one map, too: the library's batch norm sums channels_last maps
so that gradients have three times the rounding error.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evkernels.nn.separable import activated, folded, has_live_statistics
from evkernels.ops.conv_3x3 import activated_convolution_3x3, activated_in_place, convolution_3x3


class EfficientDecoder(nn.Module):
    """From the bottleneck's map up through the skip maps: four times upsample, join, convolve.

    Args:
        encoder_channels: Channels of the skip maps from the finest, then of the bottleneck.
        method: "add" or "concat".

    Forward: (x [N, encoder_channels[-1], h, w], the skip maps from the finest) to [N, encoder_channels[0], H, W] of the
    finest map's size. Keys: `decoder_layers.<level>.{0,1,3,4}`, the coarsest level first.
    """

    def __init__(self, encoder_channels: Sequence[int], method: str = "add") -> None:
        super().__init__()
        if method not in ("add", "concat"):
            raise ValueError(f"method must be 'add' or 'concat', got {method!r}")
        self.method = method
        self.winograd = True
        self.decoder_layers = nn.ModuleList(
            self._level(channels, skip) for channels, skip in pairwise(reversed(encoder_channels))
        )

    def _level(self, channels: int, skip: int) -> nn.Sequential:
        joined = 2 * skip if self.method == "concat" else skip
        return nn.Sequential(
            nn.ConvTranspose2d(channels, skip, 2, stride=2),
            nn.BatchNorm2d(skip),
            nn.GELU(),
            nn.Conv2d(joined, skip, 3, padding=1),
            nn.BatchNorm2d(skip),
            nn.GELU(),
        )

    def forward(self, x: Tensor, maps: Sequence[Tensor]) -> Tensor:
        for level, skip in zip(self.decoder_layers, reversed(maps), strict=True):
            x = self._upsampled(level, x)
            if x.shape[2:] != skip.shape[2:]:
                x = F.interpolate(x, skip.shape[2:], mode="bilinear", align_corners=False)
            x = self._convolved(level, self._joined(x, skip))
        return x

    def _joined(self, x: Tensor, skip: Tensor) -> Tensor:
        if self.method == "concat":
            return torch.cat([x, skip], dim=1)
        # In place: x is the result of an upsampling or a GELU, whose gradients do not need it.
        return x.add_(skip)

    def _upsampled(self, level: nn.Sequential, x: Tensor) -> Tensor:
        up, norm = level[:2]
        if has_live_statistics(norm):
            return activated(_spread(x, up.weight, up.bias), norm, "gelu")
        return activated_in_place(_spread(x, *folded(up, norm)), "gelu")

    def _convolved(self, level: nn.Sequential, x: Tensor) -> Tensor:
        return _conv_norm_gelu(x, *level[3:5], self.winograd)


class Head(nn.Sequential):
    """nn.Sequential(3x3 convolution to `channels`, batch norm, GELU, 1x1 convolution to one map, sigmoid)."""

    def __init__(self, in_channels: int, channels: int = 32) -> None:
        super().__init__(
            nn.Conv2d(in_channels, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.GELU(),
            nn.Conv2d(channels, 1, 1),
            nn.Sigmoid(),
        )
        self.winograd = True

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, _, pointwise, _ = self
        y = _conv_norm_gelu(x, conv, norm, self.winograd, pointwise.weight.flatten())
        return (y + pointwise.bias.to(y.dtype)).sigmoid()


def _conv_norm_gelu(
    x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, winograd: bool, projection: Tensor | None = None
) -> Tensor:
    if has_live_statistics(norm):
        weight = conv.weight.contiguous(memory_format=torch.channels_last)
        return activated(convolution_3x3(x, weight, conv.bias, winograd), norm, "gelu", projection)
    return activated_convolution_3x3(x, *folded(conv, norm), "gelu", winograd=winograd, projection=projection)


def _spread(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The transposed convolution of 2x2 at stride 2, whose windows do not overlap: one matrix product is faster."""
    batch, _, height, width = x.shape
    outputs = weight.shape[1]
    y = F.linear(x.permute(0, 2, 3, 1), weight.permute(2, 3, 1, 0).reshape(4 * outputs, -1), bias.repeat(4))
    y = y.view(batch, height, width, 2, 2, outputs).transpose(2, 3)
    return y.reshape(batch, 2 * height, 2 * width, outputs).permute(0, 3, 1, 2)
