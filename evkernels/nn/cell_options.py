"""What published recurrent cells add around the gate update, as short compositions in plain PyTorch.

The fused ops have no branch for any of this. What acts before or after an op (strides, norms, dropout of h, zoneout)
leaves the op in place; what acts inside it (peepholes, hard activations, dropout of the candidate) replaces it by
`lstm_update`, which computes in the op's precision.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from evkernels.ops.conv_3x3 import convolution_3x3


def _hardsigmoid(value: Tensor) -> Tensor:
    """PyTorch's own has a slope that is rounded to float32, in float64 too."""
    return (value / 6 + 0.5).clamp(0, 1)


GATE_ACTIVATIONS = {"sigmoid": torch.sigmoid, "hardsigmoid": _hardsigmoid}
ACTIVATIONS = {"tanh": torch.tanh, "hardtanh": functional.hardtanh}


def lstm_update(
    gates: Tensor,
    c: Tensor,
    order: str = "ifgo",
    *,
    peephole: Tensor | None = None,
    gate_activation: str = "sigmoid",
    activation: str = "tanh",
    candidate_dropout: float = 0.0,
    cell_dropout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """`ops.lstm_gates` with what that op does not do.

    Equivalent to (i, f, g, o are blocks of `gates`)::

        i, f = sigmoid(i + peephole[0] * c), sigmoid(f + peephole[1] * c)
        c_next = dropout(f * c + i * dropout(tanh(g), candidate_dropout), cell_dropout)
        h = sigmoid(o + peephole[2] * c_next) * tanh(c_next)

    Args:
        gates: Pre-activations [N, 4*C, H, W].
        c: Previous cell state [N, C, H, W].
        order: Which block is which: a permutation of "ifgo".
        peephole: Weights [3, C, 1, 1] of i, f, o, or None for none.
        gate_activation: "sigmoid" or "hardsigmoid", of i, f and o.
        activation: "tanh" or "hardtanh", of g and c_next.
        candidate_dropout: Probability to drop an element of the activated g; 0 outside training.
        cell_dropout: Probability to drop an element of c_next; 0 outside training.

    Returns:
        h, c_next: h in the dtype of `gates`, c_next in that of `c`, computed in float32 (float64 for float64). Under
        autocast h has its dtype and c_next is float32, as from the op.
    """
    device = gates.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (gates.dtype, c.dtype):
        gates, c = gates.to(torch.get_autocast_dtype(device)), c.float()
    wide = torch.promote_types(gates.dtype, torch.float32)
    gate, squash = GATE_ACTIVATIONS[gate_activation], ACTIVATIONS[activation]
    blocks = dict(zip(order, gates.to(wide).chunk(4, dim=1), strict=True))
    i, f, g, o = (blocks[name] for name in "ifgo")
    c_wide = c.to(wide)
    if peephole is not None:
        peephole = peephole.to(wide)
        i, f = i + peephole[0] * c_wide, f + peephole[1] * c_wide
    g = _dropout(squash(g), candidate_dropout)
    c_next = _dropout(gate(f) * c_wide + gate(i) * g, cell_dropout)
    if peephole is not None:
        o = o + peephole[2] * c_next
    return (gate(o) * squash(c_next)).to(gates.dtype), c_next.to(c.dtype)


def _dropout(value: Tensor, probability: float) -> Tensor:
    return functional.dropout(value, probability) if probability else value


def zoneout(new: Tensor, old: Tensor, probability: float, training: bool) -> Tensor:
    """Each element keeps its old value with `probability`; outside training it is the mean of that (Krueger et al.).

    Equivalent to::

        training:  torch.where(torch.rand(new.shape) < probability, old, new)
        otherwise: probability * old + (1 - probability) * new

    A new mask at every call. Source: Krueger et al. 2017 (arXiv:1606.01305).
    """
    if probability == 0:
        return new
    old = old.to(new.dtype)
    if training:
        return torch.where(torch.rand(new.shape, device=new.device) < probability, old, new)
    return torch.lerp(new, old, probability)


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dilation: int, padding_mode: str) -> Tensor:
    """A convolution as torch.nn.Conv2d pads it, with the padding that keeps the size at stride 1."""
    padding = dilation * (weight.shape[-1] // 2)
    if padding_mode != "zeros":
        x, padding = functional.pad(x, (padding,) * 4, mode=padding_mode), 0
    if (*weight.shape[2:], stride, padding, dilation) == (3, 3, 1, 1, 1):
        return convolution_3x3(x, weight, bias)
    return functional.conv2d(x, weight, bias, stride, padding, dilation)


def gate_norm(blocks: int, groups: int | None, channels: int, **where) -> nn.GroupNorm | None:
    """A norm of `blocks` gates of `channels` each, none of whose `groups` per gate crosses gates; None for None."""
    if groups is None:
        return None
    if groups < 1 or channels % groups:
        raise ValueError(f"norm_groups must divide hidden_channels = {channels}, got {groups}")
    return nn.GroupNorm(blocks * groups, blocks * channels, **where)


def is_wide(x: Tensor) -> bool:
    """Whether convolutions of `x` are computed in 32 bits or more, which 3x3 ops are faster in than PyTorch's library;
    in 16 bits they are not.
    """
    device = x.device.type
    narrow = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return not narrow and x.dtype.itemsize >= 4


def is_plain(module: nn.Module, kind: type[nn.Module] = nn.Conv2d) -> bool:
    """Whether something else may do what `module` does with its parameters: one that somebody has replaced,
    parametrised or hooked is called as it is.
    """
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return type(module) is kind and not any(hooks)


def check_probability(name: str, value: float, below_one: bool = False) -> None:
    if not 0 <= value <= 1 or (below_one and value == 1):
        raise ValueError(f"{name} must be in [0, 1{')' if below_one else ']'}, got {value}")


def check_choice(name: str, value: str, choices) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
