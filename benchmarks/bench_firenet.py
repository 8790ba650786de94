"""FireNet, one frame of a stream, against the network of plain PyTorch with the same weights.

At 240x180 nearly all operations are in 3x3 convolutions, three quarters of them in the six of 32 channels. Ours are
Winograd's but for the first one, with 16 products for four pixels instead of 36; those of a GRU are one op with its
gates, those of a residual block with what follows them in inference. Floor: grid and states are read, image and states
written; the gradient reads and writes as much again. Weights are few.
"""

import torch
import torch.nn.functional as F

from benchmarks.registry import Benchmark
from evkernels.models import FireNet
from evkernels.testing import tensor

BINS, CHANNELS = 5, 16
# (samples, height, width)
SHAPES = ((1, 180, 240), (1, 260, 346), (4, 64, 64))
_network = FireNet(BINS, CHANNELS)
_NAMES = tuple(name for name, _ in _network.named_parameters())


def fused(grid, h0, h1, *weights):
    image, states = torch.func.functional_call(_network, dict(zip(_NAMES, weights, strict=True)), (grid, (h0, h1)))
    return image, *states


def eager(grid, h0, h1, *weights):
    named = dict(zip(_NAMES, weights, strict=True))

    def conv(name, x):
        weight = named[f"net.{name}.weight"]
        return F.conv2d(x, weight, named[f"net.{name}.bias"], padding=weight.shape[-1] // 2)

    def gru(name, x, h):
        xh = torch.cat([x, h], dim=1)
        z, r = conv(f"{name}.update_gate", xh).sigmoid(), conv(f"{name}.reset_gate", xh).sigmoid()
        n = conv(f"{name}.out_gate", torch.cat([x, r * h], dim=1)).tanh()
        return (1 - z) * h + z * n

    def residual(name, x):
        return (conv(f"{name}.conv2", conv(f"{name}.conv1", x).relu()) + x).relu()

    h0 = gru("head.recurrent_block", conv("head.conv.conv2d", grid).relu(), h0)
    h1 = gru("resblocks.0.recurrent_block", residual("resblocks.0.conv", h0), h1)
    return conv("pred.conv2d", residual("resblocks.1", h1)), h0, h1


def inputs(shape, dtype):
    n, height, width = shape
    states = (tensor(n, CHANNELS, height, width, dtype=dtype, seed=seed).tanh() for seed in (1, 2))
    weights = [
        tensor(*value.shape, dtype=dtype, seed=3 + index) * value[0].numel() ** -0.5
        for index, value in enumerate(_network.parameters())
    ]
    return tensor(n, BINS, height, width, dtype=dtype), *states, *weights


def floor_bytes(shape, itemsize, mode):
    n, height, width = shape
    maps = BINS + 2 * CHANNELS + 1 + 2 * CHANNELS
    return itemsize * n * height * width * maps * (2 if mode == "forward+backward" else 1)


def is_winograd(weight):
    return weight.shape[1] >= CHANNELS and weight.shape[-1] == 3


def floor_flops(shape, mode):
    n, height, width = shape
    convolutions = (value for value in _network.parameters() if value.dim() == 4)
    # Winograd's method needs four products for a pixel instead of nine.
    products = sum(value.numel() * 4 // 9 if is_winograd(value) else value.numel() for value in convolutions)
    return 2 * n * height * width * products * (3 if mode == "forward+backward" else 1)


def label(shape):
    n, height, width = shape
    return f"{n}x{width}x{height}"


BENCHMARKS = (
    Benchmark(
        op="firenet",
        function=fused,
        eager=eager,
        inputs=inputs,
        shapes=SHAPES,
        gate_shapes=((1, 180, 240),),
        times_eager=4,
        tiny_shape=(2, 7, 9),
        floor_bytes=floor_bytes,
        floor_flops=floor_flops,
        items=lambda shape: shape[0] * shape[1] * shape[2],
        item="pixel",
        label=label,
        dtypes=(torch.float32,),
        modes=("inference", "forward+backward"),
        # Training is not gated: with AVX-512 it has not been measured since the GRUs are one op.
        gate_modes=("inference",),
    ),
)
