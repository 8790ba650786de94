"""Definition of the 3x3 ConvLSTM over a whole sequence: forward and hand-written backward in plain PyTorch.

The functions named `_kernel` are what the registered op computes: frames [T*N, ...] instead of [T, N, ...] and, beside
the results, what the gradient keeps.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from evkernels.reference.lstm_gates import lstm_gates, lstm_gates_backward


def conv_lstm_3x3(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    reset: Tensor | None = None,
    order: str = "ifgo",
) -> tuple[Tensor, Tensor]:
    outputs = []
    for time, frame in enumerate(x):
        h, c, _ = _step(frame, *restarted((h, c), reset, time), weight, bias, order)
        outputs.append(h)
    return torch.stack(outputs), c


def conv_lstm_3x3_kernel(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reset: Tensor | None,
    order: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [T*N, C, H, W], c_last and, if `keep`, the gates before their activations [T*N, 4*C, H, W] and the cell
    state before each step [T*N, C, H, W]; empty otherwise.
    """
    outputs, gates, cells = [], [], []
    for time, frame in enumerate(x.split(max(len(h), 1))):
        h, c = restarted((h, c), reset, time)
        cells.append(c)
        h, c, pre = _step(frame, h, c, weight, bias, order)
        gates.append(pre.to(x.dtype))
        outputs.append(h)
    kept = (torch.cat(gates), torch.cat(cells)) if keep else (x.new_empty(0), c.new_empty(0))
    return torch.cat(outputs), c.clone(), *kept


def conv_lstm_3x3_backward(
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
    output_mask: Sequence[bool] = (True,) * 5,
) -> tuple[Tensor, ...]:
    """Gradients of the first five arguments of `conv_lstm_3x3_kernel`; those that `output_mask` leaves out are empty.

    Uses neither `gates` nor `cells`, so that it is differentiable itself.
    """
    batch = max(len(h), 1)
    frames = x.split(batch)
    wide = torch.promote_types(x.dtype, torch.float32)
    states, before = [], (h, c)
    for time, frame in enumerate(frames):
        states.append(restarted(before, reset, time))
        before = _step(frame, *states[-1], weight, bias, order)[:2]
    d_h = torch.zeros_like(h, dtype=wide)
    d_c = torch.zeros_like(c, dtype=wide) if grad_c_last is None else grad_c_last.to(wide)
    wide_weight = weight.to(wide)
    d_weight, d_bias, d_x = torch.zeros_like(wide_weight), wide_weight.new_zeros(len(weight)), []
    for time in range(len(frames) - 1, -1, -1):
        if grad_output is not None:
            d_h = d_h + grad_output[time * batch : (time + 1) * batch]
        xh = torch.cat([frames[time], states[time][0]], 1).to(wide)
        d_pre, d_c = lstm_gates_backward(d_h, d_c, convolved(xh, weight, bias), states[time][1].to(wide), order)
        d_weight = d_weight + weight_gradient(xh, wide_weight, d_pre)
        d_bias = d_bias + d_pre.sum((0, 2, 3))
        d_x.append(conv_3x3_input_gradient(d_pre, wide_weight, 0, x.shape[1]))
        d_h = conv_3x3_input_gradient(d_pre, wide_weight, x.shape[1], h.shape[1])
        d_h, d_c = restarted((d_h, d_c), reset, time)
    gradients = (torch.cat(d_x[::-1]).to(x.dtype), d_h.to(h.dtype), d_c.to(c.dtype))
    gradients += (d_weight.to(weight.dtype), d_bias.to(weight.dtype))
    return tuple(d if wanted else x.new_empty(0) for d, wanted in zip(gradients, output_mask, strict=True))


def conv_3x3_input_gradient(grad: Tensor, weight: Tensor, first: int, count: int) -> Tensor:
    """The gradient of the input channels [first, first + count) of a 3x3 convolution with zero padding."""
    if grad.numel() == 0 or count == 0:  # convolutions take no empty images
        return grad.new_zeros(len(grad), count, *grad.shape[2:])
    wide = torch.promote_types(grad.dtype, torch.float32)
    return F.conv_transpose2d(grad.to(wide), weight[:, first : first + count].to(wide), padding=1).to(grad.dtype)


def conv_3x3_weight_gradient(grad: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias of a 3x3 convolution of `x` and `h` side by side, at least float32."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    xh, grad = torch.cat([x, h], 1).to(wide), grad.to(wide)
    return weight_gradient(xh, xh.new_empty(grad.shape[1], xh.shape[1], 3, 3), grad), grad.sum((0, 2, 3))


def restarted(states: tuple[Tensor, ...], reset: Tensor | None, time: int) -> tuple[Tensor, ...]:
    """The states before step `time`: zero where `reset` [T, N] says so."""
    if reset is None:
        return states
    return tuple(state.masked_fill(reset[time][:, None, None, None], 0) for state in states)


def _step(x: Tensor, h: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None, order: str) -> tuple[Tensor, ...]:
    """h, c and the pre-activations. h and c are rounded to their dtypes at every step."""
    wide = torch.promote_types(x.dtype, torch.float32)
    pre = convolved(torch.cat([x, h], 1).to(wide), weight, bias)
    h_next, c_next = lstm_gates(pre, c.to(wide), order)
    return h_next.to(h.dtype), c_next.to(c.dtype), pre


def convolved(xh: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 3x3 convolution with zero padding, in the dtype of xh: at least float32."""
    if xh.numel() == 0:
        return xh.new_zeros(len(xh), len(weight), *xh.shape[2:])
    return F.conv2d(xh, weight.to(xh.dtype), None if bias is None else bias.to(xh.dtype), padding=1)


def weight_gradient(xh: Tensor, weight: Tensor, d_pre: Tensor) -> Tensor:
    if xh.numel() == 0:
        return torch.zeros_like(weight)
    return torch.nn.grad.conv2d_weight(xh, weight.shape, d_pre, padding=1)
