"""EfficientConvLSTM over five voxel grids at 346x260, against the same network of plain PyTorch modules.

Nine tenths of the operations are in the 3x3 convolutions of the ConvLSTMs at the four skip resolutions, of the decoder
and the head. Training uses batch statistics, as in training. Floor: grids are read and outputs written, weights read
once; the gradient reads and writes as much again. Operations are those of direct sums, of which Winograd's method needs
four of nine: a share of the limit above all of it is no mistake.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.registry import Benchmark
from evkernels.models import EfficientConvLSTM
from evkernels.models.efficient_conv_lstm import MAP
from evkernels.testing import tensor

# (steps, samples, height, width)
SHAPES = ((5, 1, 260, 346),)


class _PlainConvLSTM(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.cells = nn.ModuleList(nn.Module() for _ in layer.cells)
        for plain, cell in zip(self.cells, layer.cells, strict=True):
            rows, inputs, size = cell.conv.weight.shape[:3]
            plain.conv = nn.Conv2d(inputs, rows, size, padding=size // 2)

    def forward(self, x):
        for cell in self.cells:
            steps, h = [], None
            for frame in x.unbind(1):
                if h is None:
                    h = c = frame.new_zeros(len(frame), cell.conv.out_channels // 4, *frame.shape[2:])
                i, f, o, g = cell.conv(torch.cat([frame, h], dim=1)).chunk(4, dim=1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                steps.append(h)
            x = torch.stack(steps, dim=1)
        return x

    def reset_hidden(self):
        """It keeps no state between calls."""


class _PlainDecoder(nn.Module):
    def __init__(self, decoder):
        super().__init__()
        self.decoder_layers = decoder.decoder_layers

    def forward(self, x, maps):
        for level, skip in zip(self.decoder_layers, reversed(maps), strict=True):
            x = level[:3](x)
            if x.shape[2:] != skip.shape[2:]:
                x = F.interpolate(x, skip.shape[2:], mode="bilinear", align_corners=False)
            x = level[3:](x + skip)
        return x


class _Plain(EfficientConvLSTM):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        for index in range(1, 6):
            name = f"conv{index}"
            setattr(self.encoder, name, nn.Sequential(*getattr(self.encoder, name)))
        self.skip_convlstms = nn.ModuleList(_PlainConvLSTM(layer) for layer in self.skip_convlstms)
        self.convlstm = _PlainConvLSTM(self.convlstm)
        self.decoder = _PlainDecoder(self.decoder)
        self.final_conv = nn.Sequential(*self.final_conv)

    def forward(self, frames):
        """The published one with all four skip maps, contiguous throughout: channels_last takes longer here."""
        encoded = [self.encoder(self.normalization(frame).to(frame.dtype)) for frame in frames]
        bottlenecks = [F.interpolate(x5, MAP, mode="bilinear", align_corners=False) for x5, _ in encoded]
        h = self.convlstm(torch.stack(bottlenecks, dim=1))
        maps = zip(*(maps for _, maps in encoded), strict=True)
        skips = [layer(torch.stack(frames, dim=1)) for layer, frames in zip(self.skip_convlstms, maps, strict=True)]
        steps = zip(h.unbind(1), *(skip.unbind(1) for skip in skips), strict=True)
        return (torch.cat([self.final_conv(self.decoder(x, list(frame))) for x, *frame in steps], dim=1),)


@cache
def _network(kind, height, width):
    return kind(height=height, width=width)


def _run(kind, frames, weights):
    network = _network(kind, *frames.shape[-2:]).train(torch.is_grad_enabled())
    network.reset_states()
    values, parts = {}, weights.split([value.numel() for value in network.parameters()])
    for (name, value), part in zip(network.named_parameters(), parts, strict=True):
        values[name] = part.view(value.shape)
    return torch.func.functional_call(network.to(frames.dtype), values, (frames.unbind(0),))[0]


def fused(frames, weights):
    return _run(EfficientConvLSTM, frames, weights)


def eager(frames, weights):
    return _run(_Plain, frames, weights)


def inputs(shape, dtype):
    """Sparse grids, and all weights as one vector: their gradient is compared as that of one network."""
    steps, n, height, width = shape
    generator = torch.Generator().manual_seed(1)
    grids = torch.poisson(torch.full((steps, n, 5, height, width), 0.1), generator)
    weights = [
        tensor(value.numel(), dtype=dtype, seed=3 + index) * value[0].numel() ** -0.5
        for index, value in enumerate(_network(EfficientConvLSTM, height, width).parameters())
    ]
    return grids.to(dtype), torch.cat(weights)


def floor_bytes(shape, itemsize, mode):
    steps, n, height, width = shape
    weights = sum(value.numel() for value in _network(EfficientConvLSTM, height, width).parameters())
    return itemsize * (6 * steps * n * height * width + weights) * (2 if mode == "forward+backward" else 1)


@cache
def floor_flops(shape, mode):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        eager(*inputs((1, *shape[1:]), torch.float32))
    return shape[0] * counter.get_total_flops() * (3 if mode == "forward+backward" else 1)


def label(shape):
    steps, n, height, width = shape
    return f"T{steps} {n}x{width}x{height}"


BENCHMARKS = (
    Benchmark(
        op="efficient_conv_lstm",
        function=fused,
        eager=eager,
        inputs=inputs,
        shapes=SHAPES,
        gate_shapes=SHAPES,
        times_eager=4,
        tiny_shape=(2, 1, 20, 30),
        floor_bytes=floor_bytes,
        floor_flops=floor_flops,
        items=lambda shape: shape[0] * shape[1] * shape[2] * shape[3],
        item="pixel",
        label=label,
        dtypes=(torch.float32,),
        modes=("inference", "forward+backward"),
        gate_modes=("inference",),
        compiles=False,
    ),
)
