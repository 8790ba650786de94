"""The encoder of EfficientConvLSTM, and a small network around it that predicts the next window of events.

The encoder has the published shapes, initialisation and state-dict keys. The predictor exists to run every kind of
layer of this package together and to have something to learn without labels: the future of a recording is its own
target. All arithmetic is in the layers; what is written here is how they are connected.
"""

from collections.abc import Sequence
from itertools import pairwise, zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evkernels.nn import ChannelAttention, ConvLSTMCell, EventNormalization, SeparableBlock, SeparableConv2d

_STRIDES = (1, 2, 2, 2, 2)


class EventEncoder(nn.Module):
    """Five depthwise-separable blocks, each followed by channel attention; strides 1, 2, 2, 2, 2.

    Equivalent to::

        for conv, attention in zip((conv1, conv2, conv3, conv4, conv5), channel_attention):
            x = attention(conv(x))

    Args:
        in_channels: Channels of the event representation.
        channels: Channels after each of the five blocks.

    Forward: x [N, in_channels, H, W], any H and W, to (x5, [x1, x2, x3, x4]) with xk [N, channels[k-1], Hk, Wk],
    H1 = H and every further size half of the one before, rounded up. `into` is memory for the first of these maps, for
    calls without gradients.

    State-dict keys are `conv{1..5}.{0,1,3,4}.*` and `channel_attention.{0..4}.fc.{0,2}.weight`; 69,852 parameters with
    5 input channels. In training mode batch statistics are used and updated as by torch.nn.BatchNorm2d.
    Source: EfficientConvLSTM of the SurrealEvent project.
    """

    def __init__(self, in_channels: int, channels: tuple[int, int, int, int, int] = (16, 32, 64, 128, 256)):
        super().__init__()
        if len(channels) != len(_STRIDES):
            raise ValueError(f"channels must be {len(_STRIDES)} numbers, got {channels!r}")
        self.channels = tuple(channels)
        sizes = (in_channels, *channels)
        for index, stride in enumerate(_STRIDES):
            block = SeparableBlock(sizes[index], sizes[index + 1], kernel_size=3, stride=stride, activation="gelu")
            self.add_module(f"conv{index + 1}", block)
        self.channel_attention = nn.ModuleList(ChannelAttention(size) for size in channels)
        self.apply(_initialize)

    def stages(self) -> list[tuple[nn.Module, nn.Module]]:
        """The five pairs (block, attention) in the order in which they run."""
        return [(getattr(self, f"conv{index + 1}"), self.channel_attention[index]) for index in range(len(_STRIDES))]

    def forward(self, x: Tensor, into: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
        maps = []
        for (block, attention), memory in zip_longest(self.stages(), into):
            x = block(x)
            if x.requires_grad:
                x = attention(x)
            else:
                # In memory that is there: nobody else has the block's result.
                x = torch.mul(x, attention.scale(x), out=x if memory is None else memory)
            maps.append(x)
        return maps[-1], maps[:-1]

    def empty_maps(self, x: Tensor, steps: int) -> list[Tensor]:
        """Memory for x1 to x4 of `steps` inputs like `x`, [steps, N, C, H, W] with every step channels_last."""
        maps, size = [], x.shape[2:]
        for channels, stride in zip(self.channels[:-1], _STRIDES, strict=False):
            size = [-(-side // stride) for side in size]
            shape = (steps * len(x), channels, *size)
            memory = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
            maps.append(memory.unflatten(0, (steps, len(x))))
        return maps


class EventDecoder(nn.Module):
    """From the bottleneck back to the sensor: upsample, separable convolution, add the encoder's map; four times.

    Equivalent to::

        for level, skip in zip(levels, reversed(skips)):
            x = level(F.interpolate(x, skip.shape[2:], mode="bilinear")) + skip
        x = head(x)

    Args:
        in_channels: Channels of the bottleneck.
        skip_channels: Channels of the encoder's maps, from the finest.
        out_channels: Channels of the result, which has the size of the finest map.
    """

    def __init__(self, in_channels: int, skip_channels: tuple[int, ...], out_channels: int):
        super().__init__()
        sizes = (in_channels, *reversed(skip_channels))
        self.levels = nn.ModuleList(
            SeparableConv2d(before, after, output_activation="gelu") for before, after in pairwise(sizes)
        )
        self.head = SeparableConv2d(sizes[-1], out_channels)
        # Near zero to begin with: most pixels see no event in a window.
        nn.init.normal_(self.head.pointwise.weight, std=0.01)
        nn.init.zeros_(self.head.pointwise.bias)

    def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        for level, skip in zip(self.levels, reversed(skips), strict=True):
            x = level(F.interpolate(x, skip.shape[2:], mode="bilinear", align_corners=False)) + skip
        return self.head(x)


class EventPredictor(nn.Module):
    """Predicts the next window's stacked histogram from the windows so far.

    Equivalent to::

        x, skips = encoder(normalization(histogram))
        h, c = bottleneck(x, state)
        prediction = decoder(h, skips)

    Args:
        in_channels: Channels of a stacked histogram, 2 * bins.
        hidden_channels: Channels of the recurrent bottleneck.
        channels: Channels of the encoder's blocks.

    Forward: (histogram [N, in_channels, H, W] of event counts, uint8 or floating point; state: None to begin, else what
    the call before returned) to (prediction [N, in_channels, H, W], state). The prediction is of log(1 + count). The
    state (h, c), [N, hidden_channels, H/16, W/16] each, sizes rounded up, stays in the autograd graph: detach it to
    truncate the gradient.

    Raises:
        ValueError: if `histogram` is not [N, in_channels, H, W].
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int = 64,
        channels: tuple[int, int, int, int, int] = (16, 32, 64, 128, 256),
    ):
        super().__init__()
        self.in_channels = in_channels
        self.normalization = EventNormalization()
        self.encoder = EventEncoder(in_channels, channels)
        self.bottleneck = ConvLSTMCell(channels[-1], hidden_channels, kernel_size=3)
        self.decoder = EventDecoder(hidden_channels, channels[:-1], in_channels)

    def forward(
        self, histogram: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if histogram.dim() != 4 or histogram.shape[1] != self.in_channels:
            raise ValueError(
                f"histogram must be [N, in_channels, H, W] with in_channels = {self.in_channels}, "
                f"got {tuple(histogram.shape)}"
            )
        dtype = self.bottleneck.conv.weight.dtype
        x, skips = self.encoder(self.normalization(histogram.to(dtype)).to(dtype))
        state = self.bottleneck(x, state)
        return self.decoder(state[0], skips), state


def _initialize(module: nn.Module) -> None:
    """The published initialisation of the encoder: He's normal one by fan-out, biases zero."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is None:
        return
    if weight.dim() == 4:
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
    if bias is not None:
        nn.init.zeros_(bias)
