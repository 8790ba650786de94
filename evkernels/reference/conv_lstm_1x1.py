"""Definition of the 1x1 ConvLSTM over a whole sequence: forward and hand-written backward in plain PyTorch.

The functions named `_kernel` are what the registered op computes: frames [T*N, ...] instead of [T, N, ...] and, beside
the results, what the gradient keeps, with the channels of a pixel side by side whatever the layout of the frames.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from evkernels.reference.lstm_gates import lstm_gates, lstm_gates_backward


def conv_lstm_1x1(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    reset: Tensor | None = None,
    order: str = "ifgo",
    save: str = "gates",
) -> tuple[Tensor, Tensor]:
    outputs = []
    for time, frame in enumerate(x):
        h, c, *_ = _step(frame, *_restarted(h, c, reset, time), weight, bias, order)
        outputs.append(h)
    return torch.stack(outputs), c


def conv_lstm_1x1_kernel(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reset: Tensor | None,
    order: str,
    save: str,
    precision: str = "highest",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output [T*N, C, H, W], c_last, and as `save` demands the gates after their activations, i, f, g and o [T*N, H*W,
    4*K] with K = kept_channels(C), and the cell state before each step [T*N, H*W, C]; empty otherwise. `precision`
    allows kernels to round the factors of float32 products.
    """
    outputs, gates, cells = [], [], []
    for time, frame in enumerate(x.split(max(len(h), 1))):
        h, c = _restarted(h, c, reset, time)
        cells.append(_by_pixel(c))
        h, c, activations = _step(frame, h, c, weight, bias, order)
        kept = activations.unflatten(1, (4, -1))[:, :, : kept_channels(h.shape[1])]
        gates.append(_by_pixel(kept.flatten(1, 2)))
        outputs.append(h)
    output = torch.cat(outputs)
    kept_gates = torch.cat(gates) if save == "gates" else x.new_empty(0)
    return output, c.clone(), kept_gates, torch.cat(cells) if save != "none" else c.new_empty(0)


def conv_lstm_1x1_backward(
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
    precision: str = "highest",
    output_mask: Sequence[bool] = (True,) * 5,
) -> tuple[Tensor, ...]:
    """Gradients of the first five arguments of `conv_lstm_1x1_kernel`; those that `output_mask` leaves out are empty.

    Uses neither `gates` nor `cells`, so that it is differentiable itself.
    """
    batch = max(len(h), 1)
    frames = x.split(batch)
    wide = torch.promote_types(x.dtype, torch.float32)
    states, before = [], (h, c)
    for time, frame in enumerate(frames):
        states.append(_restarted(*before, reset, time))
        before = _step(frame, *states[-1], weight, bias, order)[:2]
    d_h = torch.zeros_like(h, dtype=wide)
    d_c = torch.zeros_like(c, dtype=wide) if grad_c_last is None else grad_c_last.to(wide)
    matrix = weight.flatten(1).to(wide)
    d_weight, d_bias, d_x = torch.zeros_like(matrix), matrix.new_zeros(len(matrix)), []
    for time in range(len(frames) - 1, -1, -1):
        if grad_output is not None:
            d_h = d_h + grad_output[time * batch : (time + 1) * batch]
        xh, pre = _pre_activations(frames[time], states[time][0], weight, bias)
        d_pre, d_c = lstm_gates_backward(d_h, d_c, pre, states[time][1].to(wide), order)
        # Sample by sample: one sum over all would round each small product to the unit of a large total.
        d_weight = d_weight + torch.einsum("njyx,nkyx->njk", d_pre, xh).sum(0)
        d_bias = d_bias + d_pre.sum((0, 2, 3))
        d_frame, d_h = torch.einsum("njyx,jk->nkyx", d_pre, matrix).split([x.shape[1], h.shape[1]], 1)
        d_x.append(d_frame)
        d_h, d_c = _restarted(d_h, d_c, reset, time)
    gradients = (torch.cat(d_x[::-1]).to(x.dtype), d_h.to(h.dtype), d_c.to(c.dtype))
    gradients += (d_weight.view_as(weight).to(weight.dtype), d_bias.to(weight.dtype))
    return tuple(d if wanted else x.new_empty(0) for d, wanted in zip(gradients, output_mask, strict=True))


def kept_channels(channels: int) -> int:
    """Channels whose gates the gradient keeps: beside c at most 45 % of the 8 * C values that plain PyTorch keeps."""
    return channels * 13 // 20 // 16 * 16


def _step(x: Tensor, h: Tensor, c: Tensor, weight: Tensor, bias: Tensor | None, order: str) -> tuple[Tensor, ...]:
    """h, c and the activated gates in the order i, f, g, o. h and c are rounded to their dtypes at every step."""
    _, pre = _pre_activations(x, h, weight, bias)
    h_next, c_next = lstm_gates(pre, c.to(pre.dtype), order)
    blocks = dict(zip(order, pre.chunk(4, 1), strict=True))
    gates = torch.cat([blocks[name].tanh() if name == "g" else blocks[name].sigmoid() for name in "ifgo"], 1)
    return h_next.to(h.dtype), c_next.to(c.dtype), gates.to(x.dtype)


def _pre_activations(x: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """[x, h] and the gates before their activations, in at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    xh = torch.cat([x, h], 1).to(wide)
    if xh.numel() == 0:  # conv2d takes no empty images
        return xh, xh.new_zeros(len(xh), len(weight), *xh.shape[2:])
    return xh, F.conv2d(xh, weight.to(wide), None if bias is None else bias.to(wide))


def _restarted(h: Tensor, c: Tensor, reset: Tensor | None, time: int) -> tuple[Tensor, Tensor]:
    if reset is None:
        return h, c
    mask = reset[time][:, None, None, None]
    return h.masked_fill(mask, 0), c.masked_fill(mask, 0)


def _by_pixel(value: Tensor) -> Tensor:
    return value.flatten(2).transpose(1, 2)
