"""`conv_lstm_3x3` and its gradient, composed of registered ops and a library's convolutions.

Forward, they serve the backends that have no kernel of their own. The gradient is composed everywhere: per step the
gates and two convolutions, while the gates' gradients are in the cache. All of it is channels_last, because the CPU's
kernel keeps the gates so.
"""

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops import library
from evkernels.ops.registration import common_layout
from evkernels.reference.conv_lstm_3x3 import restarted


def composed(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reset: Tensor | None,
    order: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A kernel of `conv_lstm_3x3` for any device, see `reference.conv_lstm_3x3_kernel`."""
    layout = common_layout(x)
    if h.numel() == 0:  # conv2d takes no empty images
        results = reference.conv_lstm_3x3_kernel(x, h, c, weight, bias, reset, order, keep)
        return in_layouts(results, (layout, layout, torch.channels_last, torch.channels_last))
    outputs, gates, cells = [], [], []
    for time, frame in enumerate(x.split(len(h))):
        h, c = restarted((h, c), reset, time)
        pre = torch.conv2d(torch.cat([frame, h], 1), weight, bias, padding=1)
        if keep:
            gates.append(pre)
            cells.append(c)
        h, c = torch.ops.evkernels.lstm_gates(pre, c, order)
        outputs.append(h)
    kept = (torch.cat(gates), torch.cat(cells)) if keep else (x.new_empty(0), c.new_empty(0))
    return in_layouts((torch.cat(outputs), c, *kept), (layout, layout, torch.channels_last, torch.channels_last))


def composed_backward(
    grad_output: Tensor | None,
    grad_c_last: Tensor | None,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reset: Tensor | None,
    output: Tensor,
    gates: Tensor,
    cells: Tensor,
    order: str,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """A kernel of `conv_lstm_3x3_backward` for any device, see `reference.conv_lstm_3x3_backward`."""
    layout = common_layout(x)
    layouts = (layout, layout, layout, torch.contiguous_format, torch.contiguous_format)
    if h.numel() == 0:
        arguments = (grad_output, grad_c_last, x, h, c, weight, bias, reset, output, gates, cells, order, output_mask)
        return in_layouts(reference.conv_lstm_3x3_backward(*arguments), layouts)
    batch, inputs = len(h), x.shape[1]
    need_x, need_h = output_mask[:2]
    gradient = InputGradient(weight, inputs, need_x)
    parameters = ParameterGradients(weight, output_mask[3:])
    frames, gates, cells = (value.split(batch) for value in (x, gates, cells))
    parts = frames, before_steps(h, output, reset), gates, cells
    arriving = None if grad_output is None else grad_output.split(batch)
    d_x = torch.empty_like(x, memory_format=torch.channels_last) if need_x else None
    d_h, d_c = torch.zeros_like(h) if arriving is None else arriving[-1], grad_c_last
    for time, (frame, state, pre, cell) in reversed(list(enumerate(zip(*parts, strict=True)))):
        d_pre, d_c = torch.ops.evkernels.lstm_gates_backward(d_h, d_c, pre, cell, order)
        parameters.add(d_pre, frame, state)
        # What arrives at the state from its own output; a restart keeps the rest from it.
        from_output = arriving[time - 1] if time and arriving is not None else None
        if time or need_x or need_h:
            d_frame, d_h = gradient(d_pre, from_output if reset is None else None)
            if need_x:
                d_x[time * batch : (time + 1) * batch] = d_frame
        d_h, d_c = restarted((d_h, d_c), reset, time)
        if reset is not None and from_output is not None:
            d_h = d_h + from_output
    results = (d_x, d_h, d_c, *parameters.sums())
    return in_layouts(
        [d if wanted else x.new_empty(0) for d, wanted in zip(results, output_mask, strict=True)], layouts
    )


class InputGradient:
    """From the gradient of a 3x3 convolution of x and h side by side to those of x, without channels unless wanted,
    and of h plus a residual, both channels_last.
    """

    def __init__(self, weight: Tensor, inputs: int, need_x: bool):
        first = 0 if need_x else inputs
        self.split, self.count = inputs - first, weight.shape[1] - first
        self.weight = weight, torch.ops.evkernels.conv_3x3_gradient_weight(weight, first, self.count), first

    def __call__(self, grad: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        op = torch.ops.evkernels.conv_3x3_input_gradient
        # The op splits at whole vectors of any instruction set, and adds a residual of the gradient's dtype.
        if self.split % 16 == 0 and (residual is None or residual.dtype == grad.dtype):
            d_x, d_h = op(grad, *self.weight, self.split, self.count, residual)
        else:
            d_x, d_h = op(grad, *self.weight, 0, self.count, None)[1].tensor_split([self.split], 1)
            d_h = d_h if residual is None else d_h + residual
        return d_x, d_h


class ParameterGradients:
    """Gradients of a 3x3 convolution's weight and bias, as far as wanted, summed up step by step.

    The weight's is our kernel where the library is slower, see csrc/conv_lstm_3x3/weight_gradient.inl. Elsewhere it is
    the library's; one call of that over all frames took 1.15 times as long at 64 channels and 45x80 pixels, and needs
    the gradients of all steps side by side.
    """

    def __init__(self, weight: Tensor, wanted: list[bool]):
        self.by_kernel = library.has_slow_weight_gradient(weight)
        layout = torch.contiguous_format if self.by_kernel else torch.channels_last
        self.weight = weight.contiguous(memory_format=layout)
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.of_weight = torch.zeros_like(self.weight, dtype=wide) if wanted[0] else None
        self.of_bias = weight.new_zeros(len(weight), dtype=wide) if wanted[1] else None

    def add(self, grad: Tensor, x: Tensor, h: Tensor) -> None:
        if self.of_weight is not None and self.by_kernel:
            d_weight, d_bias = torch.ops.evkernels.conv_3x3_weight_gradient(grad, x, h.to(x.dtype))
            self.of_weight += d_weight
            if self.of_bias is not None:
                self.of_bias += d_bias
            return
        if self.of_weight is not None:
            xh = torch.cat([x, h.to(x.dtype)], 1).contiguous(memory_format=torch.channels_last)
            window = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
            self.of_weight += torch.ops.aten.convolution_backward(
                grad, xh, self.weight, None, *window, [False, True, False]
            )[1]
        if self.of_bias is not None:
            self.of_bias += grad.sum((0, 2, 3), dtype=self.of_bias.dtype)

    def sums(self) -> list[Tensor | None]:
        return [None if d is None else d.to(self.weight.dtype) for d in (self.of_weight, self.of_bias)]


def before_steps(h: Tensor, output: Tensor, reset: Tensor | None) -> list[Tensor]:
    """The hidden state before each step [N, C, H, W]."""
    before = [h, *output.split(len(h))[:-1]]
    if reset is None:
        return before
    return [state.masked_fill(restart[:, None, None, None], 0) for state, restart in zip(before, reset, strict=True)]


def in_layouts(results, layouts) -> tuple[Tensor, ...]:
    """Each result in its layout, if it is one of images."""
    return tuple(
        value.contiguous(memory_format=layout) if value.dim() == 4 else value
        for value, layout in zip(results, layouts, strict=True)
    )
