"""RVT's backbone over five frames at 640x384: layer by layer with fused cells, against plain PyTorch step by step.

The plain network has attention through scaled_dot_product_attention, and the cell as RVT writes it. Most of the
operations are the linear maps of attention and MLP; what can be saved is what lies between them, the attention's copies
and small products, the cells' traffic and the calls on small maps. Floor: frames are read and the four maps of all
steps written, weights read once; the gradient reads and writes as much again.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.registry import Benchmark
from evkernels.models.rvt import MaxViTRNN
from evkernels.testing import tensor

# (steps, samples, channels of the first stage, height, width)
SHAPES = ((5, 1, 32, 384, 640), (5, 1, 48, 384, 640))
BINS = 10


class _PlainCell(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.conv1x1 = nn.Conv2d(2 * dim, 4 * dim, 1)

    def forward(self, x, state):
        h, c = (torch.zeros_like(x),) * 2 if state is None else state
        f, i, o, g = self.conv1x1(torch.cat([x, h], dim=1)).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


def _self_attended(layer, x):
    q, k, v = layer.qkv(x).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2).chunk(3, dim=-1)
    return layer.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def _attended(layer, x):
    """The layer as RVT writes it, with the partitions put back before the addition."""
    n, height, width, channels = x.shape
    rows, columns = layer.partition_size
    y = layer.norm1(x)
    if layer.partition_type == "window":
        y = y.view(n, height // rows, rows, width // columns, columns, channels).permute(0, 1, 3, 2, 4, 5)
    else:
        y = y.view(n, rows, height // rows, columns, width // columns, channels).permute(0, 2, 4, 1, 3, 5)
    y = _self_attended(layer.self_attn, y.reshape(-1, rows * columns, channels))
    y = y.view(n, height // rows, width // columns, rows, columns, channels)
    y = y.permute((0, 1, 3, 2, 4, 5) if layer.partition_type == "window" else (0, 3, 1, 4, 2, 5))
    x = x + layer.ls1(y.reshape(x.shape))
    return x + layer.ls2(layer.mlp(layer.norm2(x)))


class _LayerMajor(MaxViTRNN):
    def forward(self, frames):
        maps, _ = self.forward_sequence(frames)
        return tuple(maps.values())


class _Stepwise(MaxViTRNN):
    """The same parameters in the same places, one frame after the other."""

    def __init__(self, *arguments, **others):
        super().__init__(*arguments, **others)
        for stage in self.stages:
            stage.lstm = _PlainCell(stage.lstm.dim)

    def forward(self, frames):
        states, steps = [None] * len(self.stages), []
        for x in frames:
            for index, stage in enumerate(self.stages):
                x = stage.downsample_cf2cl(x)
                for block in stage.att_blocks:
                    x = _attended(block.att_grid, _attended(block.att_window, x))
                x, _ = states[index] = stage.lstm(x.permute(0, 3, 1, 2), states[index])
            steps.append([h for h, _ in states])
        return tuple(torch.stack(maps) for maps in zip(*steps, strict=True))


@cache
def _network(kind, channels, height, width):
    """Without values: these come with each call, so that gradients with respect to them can be compared."""
    with torch.device("meta"):
        heads = {"dim_head": 24 if channels == 48 else min(32, channels)}
        return kind(2 * BINS, (height // 64, width // 64), embed_dim=channels, attention=heads)


def _run(kind, frames, channels, weights):
    network = _network(kind, channels, *frames.shape[-2:])
    values, parts = {}, weights.split([value.numel() for value in network.parameters()])
    for (name, value), part in zip(network.named_parameters(), parts, strict=True):
        values[name] = part.view(value.shape)
    return torch.func.functional_call(network, values, (frames,))


def fused(frames, channels, weights):
    return _run(_LayerMajor, frames, channels, weights)


def eager(frames, channels, weights):
    return _run(_Stepwise, frames, channels, weights)


def inputs(shape, dtype):
    """Frames, channels, and all weights as one vector: their gradient is compared as that of one network."""
    steps, n, channels, height, width = shape
    weights = [
        tensor(value.numel(), dtype=dtype, seed=3 + index) * value[0].numel() ** -0.5
        for index, value in enumerate(_network(_LayerMajor, channels, height, width).parameters())
    ]
    return tensor(steps, n, 2 * BINS, height, width, dtype=dtype), channels, torch.cat(weights)


def floor_bytes(shape, itemsize, mode):
    steps, n, channels, height, width = shape
    # A stage has twice the channels and a quarter of the positions of the one before.
    maps = channels / 16 * (1 + 1 / 2 + 1 / 4 + 1 / 8)
    values = steps * n * height * width * (2 * BINS + maps) + _parameters(shape)
    return int(itemsize * values) * (2 if mode == "forward+backward" else 1)


def floor_flops(shape, mode):
    """Of convolutions and linear maps; attention's own products are a tenth of them."""
    steps, n, channels, height, width = shape
    products = 0
    for name, value in _network(_LayerMajor, channels, height, width).named_parameters():
        if value.dim() > 1:
            products += value.numel() / (4 * 2 ** int(name.split(".")[1])) ** 2
    return int(2 * steps * n * height * width * products) * (3 if mode == "forward+backward" else 1)


def _parameters(shape):
    return sum(value.numel() for value in _network(_LayerMajor, *shape[2:]).parameters())


def label(shape):
    steps, n, channels, height, width = shape
    return f"T{steps} {n}x{width}x{height} embed {channels}"


BENCHMARKS = (
    Benchmark(
        op="rvt_backbone",
        function=fused,
        eager=eager,
        inputs=inputs,
        shapes=SHAPES,
        gate_shapes=SHAPES[:1],
        tiny_shape=(2, 1, 8, 64, 64),
        floor_bytes=floor_bytes,
        floor_flops=floor_flops,
        items=lambda shape: shape[0] * shape[1] * shape[3] * shape[4],
        item="pixel",
        label=label,
        dtypes=(torch.float32,),
        modes=("inference", "forward+backward"),
        gate_modes=("inference",),
        # Frames have five dimensions, and both networks make their maps channels_last.
        layouts=("contiguous",),
        compiles=False,
    ),
)
