"""RVT's recurrent layer with a depthwise 3x3 convolution of h, over a sequence, against the cell in plain PyTorch.

`nn.DWSConvLSTM2d` runs a step as the ops depthwise_conv2d and, up to 128 channels or in 16 bits, conv_lstm_1x1. At C =
64 it takes 0.83 of the time in float32 inference and 0.81 in training of what the library's 1x1 convolution and the op
lstm_gates take; in bfloat16 without AMX a quarter, at C = 256 too. In float32 with more channels it is these, which are
as fast at C = 256 in inference, and in training take 0.75 of the time: every call of conv_lstm_1x1 packs the weights
and sums their gradient anew. Floors as for conv_lstm_1x1, to which the depthwise convolution adds 18 operations per
element.
"""

import torch
import torch.nn.functional as F

from benchmarks import bench_conv_lstm_1x1 as one_by_one
from benchmarks.registry import Benchmark
from evkernels.nn import DWSConvLSTM2d
from evkernels.testing import tensor

STAGES = one_by_one.STAGES[1:3] + one_by_one.STAGES[4:]
_layers = {channels: DWSConvLSTM2d(channels) for channels in {5, *(shape[2] for shape in STAGES)}}
_NAMES = ("conv3x3_dws.weight", "conv3x3_dws.bias", "conv1x1.weight", "conv1x1.bias")


class Sequence(torch.nn.Module):
    """The layer called for its sequence, so that `functional_call` reaches its parameters."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, state):
        output, (_, c) = self.layer.forward_sequence(x, state)
        return output, c


def fused(frames, h, c, *weights):
    named = {f"layer.{name}": value for name, value in zip(_NAMES, weights, strict=True)}
    x = frames.unflatten(0, (-1, len(h)))
    return torch.func.functional_call(Sequence(_layers[h.shape[1]]), named, (x, (h, c)))


def eager(frames, h, c, depthwise, depthwise_bias, weight, bias):
    output = []
    for frame in frames.split(len(h)):
        h = F.conv2d(h, depthwise, depthwise_bias, padding=1, groups=len(depthwise))
        f, i, o, g = F.conv2d(torch.cat([frame, h], dim=1), weight, bias).chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        output.append(h)
    return torch.stack(output), c


def inputs(shape, dtype):
    frames, h, c, weight, bias = one_by_one.inputs(shape, dtype)
    channels = shape[2]
    depthwise = tensor(channels, 1, 3, 3, dtype=dtype, seed=6) / 3
    return frames, h, c, depthwise, tensor(channels, dtype=dtype, seed=7), weight, bias


def floor_flops(shape, mode):
    products = 18 * torch.Size(shape).numel() * (3 if mode == "forward+backward" else 1)
    return one_by_one.floor_flops(shape, mode) + products


BENCHMARKS = (
    Benchmark(
        op="dws_conv_lstm",
        function=fused,
        eager=eager,
        inputs=inputs,
        shapes=STAGES,
        # Not faster than PyTorch everywhere, so that no shape is a gate.
        gate_shapes=(),
        tiny_shape=(2, 2, 5, 3, 7),
        floor_bytes=one_by_one.floor_bytes,
        floor_flops=floor_flops,
        label=one_by_one.label,
        modes=("inference", "forward+backward"),
    ),
)
