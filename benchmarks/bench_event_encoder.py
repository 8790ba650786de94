"""The encoder of EfficientConvLSTM on one frame, against the same weights in plain PyTorch.

Five depthwise-separable blocks with batch norms, in evaluation mode for inference and in training mode with gradients,
and channel attention behind each. Floor: each block reads its input and writes its output, attention reads and writes
it once more; the gradient reads and writes twice as much. Weights are few.
"""

import torch
import torch.nn.functional as F

from benchmarks.registry import Benchmark
from evkernels.models import EventEncoder
from evkernels.testing import tensor

CHANNELS, STRIDES = (5, 16, 32, 64, 128, 256), (1, 2, 2, 2, 2)
SHAPES = ((1, 260, 346),)
_encoder = EventEncoder(CHANNELS[0])
_NAMES = tuple(name for name, _ in _encoder.named_parameters())


def _all_maps(result):
    last, others = result
    return (*others, last)


def fused(x, *weights):
    _encoder.train(torch.is_grad_enabled())
    return _all_maps(torch.func.functional_call(_encoder, dict(zip(_NAMES, weights, strict=True)), (x,)))


def eager(x, *weights):
    named = dict(zip(_NAMES, weights, strict=True))
    training = torch.is_grad_enabled()

    def norm(x, name):
        buffer = _encoder.get_submodule(name)
        statistics = (None, None) if training else (buffer.running_mean.to(x.dtype), buffer.running_var.to(x.dtype))
        return F.batch_norm(x, *statistics, named[f"{name}.weight"], named[f"{name}.bias"], training)

    maps = []
    for index, stride in enumerate(STRIDES):
        block, gate = f"conv{index + 1}", f"channel_attention.{index}.fc"
        x = F.conv2d(x, named[f"{block}.0.weight"], named[f"{block}.0.bias"], stride, 1, groups=x.shape[1])
        x = F.gelu(norm(x, f"{block}.1"))
        x = F.gelu(norm(F.conv2d(x, named[f"{block}.3.weight"], named[f"{block}.3.bias"]), f"{block}.4"))
        scale = F.gelu(F.conv2d(x.mean((2, 3), keepdim=True), named[f"{gate}.0.weight"]))
        x = x * F.conv2d(scale, named[f"{gate}.2.weight"]).sigmoid()
        maps.append(x)
    return tuple(maps)


def inputs(shape, dtype):
    n, height, width = shape
    weights = []
    for index, (name, value) in enumerate(_encoder.named_parameters()):
        random = tensor(*value.shape, dtype=dtype, seed=index + 1)
        # Convolutions keep the size of their input's values; the weights of norms are near 1, biases near 0.
        scaled = random * value[0].numel() ** -0.5 if value.dim() == 4 else random / 4
        weights.append(scaled + 1 if value.dim() == 1 and name.endswith("weight") else scaled)
    return tensor(n, CHANNELS[0], height, width, dtype=dtype), *weights


def sizes(shape):
    """(input channels, output channels, input pixels, output pixels) of the blocks."""
    n, height, width = shape
    for before, after, stride in zip(CHANNELS, CHANNELS[1:], STRIDES, strict=False):
        pixels = n * height * width
        height, width = (height - 1) // stride + 1, (width - 1) // stride + 1
        yield before, after, pixels, n * height * width


def floor_bytes(shape, itemsize, mode):
    moved = sum(before * pixels + 3 * after * outputs for before, after, pixels, outputs in sizes(shape))
    return itemsize * moved * (3 if mode == "forward+backward" else 1)


def floor_flops(shape, mode):
    products = sum(2 * outputs * before * (9 + after) for before, after, _, outputs in sizes(shape))
    return products * (3 if mode == "forward+backward" else 1)


BENCHMARKS = (
    Benchmark(
        op="event_encoder",
        function=fused,
        eager=eager,
        inputs=inputs,
        shapes=SHAPES,
        gate_shapes=SHAPES,
        tiny_shape=(2, 17, 19),
        floor_bytes=floor_bytes,
        floor_flops=floor_flops,
        items=lambda shape: shape[0] * shape[1] * shape[2],
        item="pixel",
        dtypes=(torch.float32,),
        # Through ten batch norms in training two right programs differ by more than the rule allows.
        modes=("inference",),
    ),
)
