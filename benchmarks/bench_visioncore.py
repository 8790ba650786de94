"""VisionCore's modulator, 288 to 256 channels over five frames, against the same layers of plain PyTorch.

Nearly all operations are in two 3x3 convolutions: here they are Winograd's, with weights transformed in every call. The
group norm and the gates are between them.
Floor: features are read, the last state written, and weights read once; the gradient reads and writes as much again.
"""

import torch
import torch.nn.functional as F

from benchmarks.registry import Benchmark
from evkernels.nn.compat.visioncore import ConvGRUModulator
from evkernels.testing import tensor

# (steps, samples, channels, height, width): 51x51 pixels before, or 104x104.
SHAPES = ((5, 4, 256, 6, 6), (5, 2, 256, 13, 13))
BEHAVIOR, EMBEDDED = 42, 32
_networks = {}


def _network(channels):
    """Without values: these come with each call."""
    if channels not in _networks:
        with torch.device("meta"):
            _networks[channels] = ConvGRUModulator(
                {"feature_dim": channels, "behavior_dim": BEHAVIOR, "beh_emb_dim": EMBEDDED}
            )
    return _networks[channels]


def fused(features, behavior, *weights):
    network = _network(features.shape[1])
    named = dict(zip((name for name, _ in network.named_parameters()), weights, strict=True))
    return torch.func.functional_call(network, named, (features, behavior))


def eager(features, behavior, embed, embed_bias, h, x_weight, x_bias, h_weight, scale, shift, out, out_bias):
    groups = min(32, features.shape[1])
    embedded = F.linear(behavior, embed, embed_bias)[:, :, None, None, None].expand(-1, -1, *features.shape[2:])
    frames = torch.cat([features, embedded], dim=1)
    h = h.expand(len(features), -1, *features.shape[3:])
    for frame in frames.unbind(2):
        x_z, x_r, x_n = F.conv2d(frame, x_weight, x_bias, padding=1).chunk(3, dim=1)
        h_z, h_r, h_n = F.group_norm(F.conv2d(h, h_weight, padding=1), groups, scale, shift).chunk(3, dim=1)
        z, r = (x_z + h_z).sigmoid(), (x_r + h_r).sigmoid()
        h = (1 - z) * h + z * (x_n + h_n + r * h).tanh()
    return F.conv2d(h, out, out_bias)[:, :, None]


def inputs(shape, dtype):
    steps, n, channels, height, width = shape
    weights = [
        tensor(*value.shape, dtype=dtype, seed=3 + index) * value[0].numel() ** -0.5
        for index, value in enumerate(_parameters(channels))
    ]
    return (tensor(n, channels, steps, height, width, dtype=dtype), tensor(n, BEHAVIOR, dtype=dtype, seed=1), *weights)


def _parameters(channels):
    network = _network(channels)
    order = ["beh_emb.weight", "beh_emb.bias", "gru.h0", "gru.cell.conv_x.weight", "gru.cell.conv_x.bias"]
    order += ["gru.cell.conv_h.weight", "gru.cell.layer_norm.weight", "gru.cell.layer_norm.bias"]
    order += ["output_proj.weight", "output_proj.bias"]
    named = dict(network.named_parameters())
    assert list(named) == order
    return [named[name] for name in order]


def floor_bytes(shape, itemsize, mode):
    steps, n, channels, height, width = shape
    weights = sum(value.numel() for value in _parameters(channels))
    values = n * channels * height * width * (steps + 1) + weights
    return itemsize * values * (2 if mode == "forward+backward" else 1)


def floor_flops(shape, mode):
    steps, n, channels, height, width = shape
    products = 27 * channels * (2 * channels + EMBEDDED) * steps + channels * channels
    return 2 * n * height * width * products * (3 if mode == "forward+backward" else 1)


def label(shape):
    steps, n, channels, height, width = shape
    return f"T{steps} {n}x{channels}x{height}x{width}"


BENCHMARKS = (
    Benchmark(
        op="visioncore_modulator",
        function=fused,
        eager=eager,
        inputs=inputs,
        shapes=SHAPES,
        gate_shapes=SHAPES[1:],
        times_eager=4,
        tiny_shape=(2, 1, 8, 3, 3),
        floor_bytes=floor_bytes,
        floor_flops=floor_flops,
        items=lambda shape: shape[0] * shape[1] * shape[3] * shape[4],
        item="pixel",
        label=label,
        dtypes=(torch.float32,),
        modes=("inference", "forward+backward"),
        gate_modes=("inference",),
        layouts=("contiguous",),
    ),
)
