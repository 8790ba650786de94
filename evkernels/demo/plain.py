"""The same computations in PyTorch's own operators: what the fused ops are compared with, in speed and in rounding.

The references define the ops and are written to be read; a user without this package would write what stands here.
Speed-ups are therefore taken against the best of these forms and the reference, each in its better memory layout.
"""

import copy
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evkernels.models import EventPredictor
from evkernels.nn import ConvLSTMCell, SeparableBlock, SeparableConv2d


def plain_copy(model: EventPredictor) -> EventPredictor:
    """A copy with the same weights whose fused layers are replaced by modules of torch.nn."""
    return _replace(copy.deepcopy(model))


def variant(form: str, model: EventPredictor) -> EventPredictor:
    """A copy of `model` as `form` runs it: plain for "PyTorch...", weights in the layout the name ends with."""
    own = plain_copy(model) if form.startswith("PyTorch") else copy.deepcopy(model)
    return own.to(memory_format=torch.channels_last) if form.endswith("channels_last") else own


def _replace(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        plain = _plain(child)
        if plain is None:
            _replace(child)
        else:
            plain.load_state_dict(child.state_dict())
            weight = next(child.parameters())
            setattr(module, name, plain.to(weight.device, weight.dtype).train(child.training))
    return module


def _plain(layer: nn.Module) -> nn.Module | None:
    if isinstance(layer, SeparableBlock):
        return nn.Sequential(*layer)
    if isinstance(layer, SeparableConv2d):
        return _Separable(layer)
    if isinstance(layer, ConvLSTMCell):
        return _ConvLSTM(layer)
    return None


class _Separable(nn.Module):
    def __init__(self, layer: SeparableConv2d):
        super().__init__()
        state = layer.state_dict()
        outputs, inputs = state["pointwise.weight"].shape[:2]
        size = state["depthwise.weight"].shape[-1]
        self.depthwise = nn.Conv2d(inputs, inputs, size, padding=size // 2, groups=inputs)
        self.pointwise = nn.Conv2d(inputs, outputs, 1)
        self.activation = nn.GELU() if layer.output_activation == "gelu" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.pointwise(self.depthwise(x)))


class _ConvLSTM(nn.Module):
    def __init__(self, layer: ConvLSTMCell):
        super().__init__()
        rows, inputs, size = layer.conv.weight.shape[:3]
        self.conv = nn.Conv2d(inputs, rows, size, padding=size // 2)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        if state is None:
            zeros = x.new_zeros(x.shape[0], self.conv.weight.shape[0] // 4, *x.shape[2:])
            state = (zeros, zeros)
        i, f, g, o = self.conv(torch.cat((x, state[0]), dim=1)).chunk(4, dim=1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


def _flat_index(x: Tensor, y: Tensor, t: Tensor, p: Tensor, bins: int, height: int, width: int) -> Tensor:
    """Where each event of a sorted window counts in the flattened histogram."""
    share = (t - t[0]).float() / (t[-1] - t[0]).clamp(min=1).float()
    time_bin = (share * bins).floor().clamp(max=bins - 1).long()
    return ((p.long() * bins + time_bin) * height + y.long()) * width + x.long()


def _put(index: Tensor, size: int) -> Tensor:
    counts = torch.zeros(size, dtype=torch.int16, device=index.device)
    counts.put_(index, torch.ones_like(index, dtype=torch.int16), accumulate=True)
    return counts.clamp_(max=255).to(torch.uint8)


def _bincount(index: Tensor, size: int) -> Tensor:
    return torch.bincount(index, minlength=size).clamp_(max=255).to(torch.uint8)


def _histograms(count: Callable, columns: tuple[Tensor, ...], offsets: Tensor, bins: int, height: int, width: int):
    size = 2 * bins * height * width
    result = []
    for begin, end in pairwise(offsets.tolist()):
        window = [column[begin:end] for column in columns]
        index = _flat_index(*window, bins, height, width) if begin < end else columns[2].new_empty(0)
        result.append(count(index, size).view(2 * bins, height, width))
    return torch.stack(result)


def histogram_forms(columns: tuple[Tensor, ...], offsets: Tensor, bins: int, height: int, width: int) -> dict:
    """The stacked histogram of every window [B, 2*bins, H, W] as people write it: with put_ (RVT) and with bincount."""
    return {
        "PyTorch, put_": lambda: _histograms(_put, columns, offsets, bins, height, width),
        "PyTorch, bincount": lambda: _histograms(_bincount, columns, offsets, bins, height, width),
    }


def loss(prediction: Tensor, histogram: Tensor) -> Tensor:
    """Mean squared error against log(1 + count)."""
    return F.mse_loss(prediction, histogram.to(prediction.dtype).log1p())
