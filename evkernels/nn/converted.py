"""What `convert` puts in the place of other projects' modules: same parameters, same state-dict keys, other kernels.

Each takes over the attributes of the module whose place it takes, so that what reads them goes on working.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evkernels import ops
from evkernels.nn.separable import folded, has_own_statistics, normalized, pays
from evkernels.ops import registration

Path = tuple[str, ...]


def take_place(kind: type[nn.Module], of: nn.Module, **attributes) -> nn.Module:
    """A module of class `kind` with the attributes of `of`: the very parameters, buffers and children."""
    module = kind.__new__(kind)
    for name, value in vars(of).items():
        # Dictionaries of parameters, children and hooks are copied, so that neither module changes the other's.
        module.__dict__[name] = value.copy() if isinstance(value, dict | set) else value
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@dataclass(frozen=True)
class Step:
    """One fused op, or one module as it is; members are paths below the sequence."""

    first: Path
    norm: Path | None = None
    activation: str = "none"
    pointwise: Path | None = None
    output_norm: Path | None = None
    output_activation: str = "none"
    fused: bool = False
    # All that it stands for, in order.
    members: tuple[Path, ...] = ()


class FusedSequential(nn.Sequential):
    """A torch.nn.Sequential, nested ones included, in which some neighbours run as one op.

    Norms are folded into the convolutions at every call in which they are in evaluation mode, as SeparableBlock does
    it; a step between two norms is one op in training mode too, others run module by module while a norm is in it.
    """

    steps: tuple[Step, ...]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            norms = [self._at(path) for path in (step.norm, step.output_norm) if path]
            if step.fused and not any(norm.training for norm in norms):
                x = self._fused(step, x)
            elif self._trains_in_one_op(step, norms) and pays(x):
                depthwise, pointwise = self._at(step.first), self._at(step.pointwise)
                activations = (step.activation, step.output_activation)
                x = normalized(x, depthwise, norms[0], pointwise, norms[1], activations)
            else:
                for path in step.members:
                    x = self._at(path)(x)
        return x

    def _trains_in_one_op(self, step: Step, norms: list[nn.Module]) -> bool:
        return step.fused and len(norms) == 2 and all(map(has_own_statistics, norms)) and self._is_plain(step)

    def _fused(self, step: Step, x: Tensor) -> Tensor:
        depthwise = self._at(step.first)
        weight, bias = self._weights(step.first, step.norm)
        padding, stride, dilation = depthwise.padding[0], depthwise.stride[0], depthwise.dilation[0]
        if depthwise.padding_mode != "zeros" and padding:
            layout = registration.common_layout(x)
            x, padding = F.pad(x, (padding,) * 4, depthwise.padding_mode).contiguous(memory_format=layout), 0
        if step.pointwise is None:
            return ops.depthwise_conv2d(x, weight, bias, stride, padding, step.activation, dilation)
        output_weight, output_bias = self._weights(step.pointwise, step.output_norm)
        return ops.separable_conv2d(
            x, weight, output_weight, bias, output_bias, stride, padding, step.activation, step.output_activation
        )

    def _is_plain(self, step: Step) -> bool:
        return self._at(step.first).padding_mode == "zeros"

    def _weights(self, convolution: Path, norm: Path | None) -> tuple[Tensor, Tensor | None]:
        module = self._at(convolution)
        return folded(module, self._at(norm)) if norm else (module.weight, module.bias)

    def _at(self, path: Path) -> nn.Module:
        module = self
        for name in path:
            module = module._modules[name]
        return module


class RVTConvLSTM(nn.Module):
    """DWSConvLSTM2d of RVT: `conv3x3_dws` on h or on [x, h], `conv1x1`, gates in the order f, i, o, g."""

    def forward(self, x: Tensor, h_and_c_previous: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        h, c = (torch.zeros_like(x), torch.zeros_like(x)) if h_and_c_previous is None else h_and_c_previous
        weight = getattr(self.conv3x3_dws, "weight", None)
        on_hidden = weight is not None and weight.shape[0] == x.shape[1]
        h = h.to(x.dtype)
        xh = torch.cat([x, self.conv3x3_dws(h) if on_hidden else h], dim=1)
        gates = self.conv1x1(xh if on_hidden else self.conv3x3_dws(xh))
        return ops.lstm_gates(gates, _beside(c, gates), "fiog")


class E2VIDConvLSTM(nn.Module):
    """ConvLSTM of E2VID: one convolution `Gates` of [x, h], gates in the order i, f, o, g."""

    def forward(self, input_: Tensor, prev_state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        h, c = (_zeros(input_, self.Gates.out_channels // 4),) * 2 if prev_state is None else prev_state
        gates = self.Gates(torch.cat([input_, h.to(input_.dtype)], dim=1))
        return ops.lstm_gates(gates, _beside(c, gates), "ifog")


class E2VIDConvGRU(nn.Module):
    """ConvGRU of E2VID: `update_gate` and `reset_gate` of [x, h], `out_gate` of [x, r * h]."""

    def forward(self, input_: Tensor, prev_state: Tensor | None = None) -> Tensor:
        h = _zeros(input_, self.out_gate.out_channels) if prev_state is None else prev_state
        xh = torch.cat([input_, h.to(input_.dtype)], dim=1)
        gates = torch.cat([self.update_gate(xh), self.reset_gate(xh)], dim=1)
        h = _beside(h, gates)
        z, rh = ops.gru_reset(gates, h)
        return ops.gru_update(z, self.out_gate(torch.cat([input_, rh.to(input_.dtype)], dim=1)), h)


def _beside(state: Tensor, gates: Tensor) -> Tensor:
    """The state in the dtype of the gates, or in float32 beside 16-bit ones."""
    return state if state.dtype == torch.float32 and gates.dtype.itemsize == 2 else state.to(gates.dtype)


def _zeros(x: Tensor, channels: int) -> Tensor:
    return x.new_zeros(x.shape[0], channels, *x.shape[2:])
