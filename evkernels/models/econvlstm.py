"""EConvlstm, which EfficientConvLSTM was made to replace: a MobileNetV2 encoder, ConvLSTMs on its maps, ReLU decoder.

It is here for the comparison of the two. MobileNetV2 is written out, under torchvision's keys.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evkernels.models.efficient_conv_lstm import BINS, MAP, grid_of
from evkernels.models.efficient_decoder import EfficientDecoder
from evkernels.nn.compat import eseg

# Expansion, channels, blocks and stride of MobileNetV2's stages (Sandler et al. 2018, arXiv:1801.04381, table 2).
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
# The layers whose maps the network goes on with, at strides 2, 4, 8, 16 and 32, and their channels.
TAPS = {0: 32, 2: 24, 4: 32, 7: 64, 18: 1280}


class EConvlstm(nn.Module):
    """Sequences of events to a map between 0 and 1 per window, on MobileNetV2.

    Args:
        width, height: Of the sensor.
        skip_lstm: Whether a ConvLSTM runs on each of the four skip maps.

    Forward, state and `training` as in EfficientConvLSTM; encodings are [B, T, 128, 9, 11]. Keys: `encoder.backbone`,
    `skip_convlstms`, `convlstm`, `decoder.decoder_layers.<level>.{0,2}`, `final_conv.{0,2}`. The last upsampling, to
    the sensor's size, is bilinear. Source: eseg; its weights for RGB images are not loaded.
    """

    def __init__(self, width: int = 346, height: int = 260, skip_lstm: bool = True) -> None:
        super().__init__()
        self.width, self.height = width, height
        self.encoder = MobileNetEncoder(BINS)
        *skips, deepest = TAPS.values()
        self.skip_convlstms = nn.ModuleList(
            eseg.ConvLSTM(channels, channels, 3, 1) for channels in (skips if skip_lstm else ())
        )
        self.convlstm = eseg.ConvLSTM(deepest, 128, 3, 2)
        self.decoder = _ReluDecoder((*skips, 128))
        self.final_conv = nn.Sequential(
            nn.Conv2d(skips[0], 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 1, 1), nn.Sigmoid()
        )

    def forward(
        self, event_sequence: Sequence[Tensor], training: bool | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        del training
        if len(event_sequence) == 0:
            raise ValueError("event_sequence must hold at least one window")
        grids = [grid_of(window, self.height, self.width) for window in event_sequence]
        seq_events = [grid for grid, window in zip(grids, event_sequence, strict=True) if window.dim() == 3]
        frames = [self.encoder(grid.to(self.final_conv[0].weight.dtype)) for grid in grids]
        *skips, deepest = (torch.stack(maps, dim=1) for maps in zip(*frames, strict=True))
        small = F.interpolate(deepest.flatten(0, 1), MAP, mode="bilinear", align_corners=False)
        encodings = self.convlstm(small.unflatten(0, deepest.shape[:2]))
        if len(self.skip_convlstms):
            skips = [layer(maps) for layer, maps in zip(self.skip_convlstms, skips, strict=True)]
        x = self.decoder(encodings.flatten(0, 1), [maps.flatten(0, 1) for maps in skips])
        x = F.interpolate(x, (self.height, self.width), mode="bilinear", align_corners=False)
        outputs = self.final_conv(x).view(*encodings.shape[:2], self.height, self.width)
        return outputs, encodings.detach(), seq_events

    def reset_states(self) -> None:
        """Forgets the states: the next call starts from zeros."""
        for layer in (*self.skip_convlstms, self.convlstm):
            layer.reset_hidden()

    def detach_states(self) -> None:
        """Cuts the states off from the graph of the calls before."""
        for layer in (*self.skip_convlstms, self.convlstm):
            layer.detach_hidden()


class MobileNetEncoder(nn.Module):
    """MobileNetV2's features as `backbone`: [N, channels, H, W] to the maps of the layers `TAPS`."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        layers, before = [_conv(in_channels, 32, 3, stride=2)], 32
        for expansion, channels, blocks, stride in _STAGES:
            for block in range(blocks):
                layers.append(InvertedResidual(before, channels, stride if block == 0 else 1, expansion))
                before = channels
        self.backbone = nn.Sequential(*layers, _conv(before, 1280, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for index, layer in enumerate(self.backbone):
            x = layer(x)
            if index in TAPS:
                maps.append(x)
        return maps


class InvertedResidual(nn.Module):
    """1x1 to more channels, depthwise 3x3, 1x1 to fewer without activation; added to x where shapes allow."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.adds = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *([_conv(in_channels, hidden, 1)] if expansion != 1 else []),
            _conv(hidden, hidden, 3, stride=stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class _ReluDecoder(EfficientDecoder):
    def _level(self, channels: int, skip: int) -> nn.Sequential:
        return nn.Sequential(
            nn.ConvTranspose2d(channels, skip, 2, stride=2), nn.ReLU(), nn.Conv2d(skip, skip, 3, padding=1), nn.ReLU()
        )

    def _joined(self, x: Tensor, skip: Tensor) -> Tensor:
        return x + skip  # Not in place: ReLU's gradient needs its result.

    def _upsampled(self, level: nn.Sequential, x: Tensor) -> Tensor:
        return level[:2](x)

    def _convolved(self, level: nn.Sequential, x: Tensor) -> Tensor:
        return level[2:](x)


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())
