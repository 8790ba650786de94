"""`conv_lstm_1x1` and its gradient, composed of registered ops and a library's products.

They serve the backends that have no kernel of their own for them: on a GPU a step's product and the fused gates are two
kernels, and what does not depend on the state, in the gradient all but one product per step, is done for all frames at
once. The gradient keeps c alone and computes the gates again: one product of all frames.
"""

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops.registration import common_layout


def composed(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reset: Tensor | None,
    order: str,
    save: str,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A kernel of `conv_lstm_1x1` for any device, see `reference.conv_lstm_1x1_kernel`."""
    if h.numel() == 0:  # conv2d takes no empty images
        return reference.conv_lstm_1x1_kernel(x, h, c, weight, bias, reset, order, save, precision)
    layout = common_layout(x)
    outputs, gates, cells = [], [], []
    for time, frame in enumerate(x.split(len(h))):
        h, c = _restarted((h, c), reset, time)
        pre = torch.conv2d(torch.cat([frame, h], 1), weight, bias)
        if save == "gates":
            blocks = dict(zip(order, pre.chunk(4, 1), strict=True))
            kept = reference.kept_channels(h.shape[1])
            pairs = [(name, blocks[name][:, :kept]) for name in "ifgo"]
            activated = [block.tanh() if name == "g" else block.sigmoid() for name, block in pairs]
            gates.append(torch.cat(activated, 1).flatten(2).transpose(1, 2))
        if save != "none":
            cells.append(c.flatten(2).transpose(1, 2))
        h, c = torch.ops.evkernels.lstm_gates(pre, c, order)
        outputs.append(h)
    return (
        torch.cat(outputs).contiguous(memory_format=layout),
        c.contiguous(memory_format=layout),
        torch.cat(gates).contiguous() if gates else x.new_empty(0),
        torch.cat(cells).contiguous() if cells else c.new_empty(0),
    )


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
    precision: str,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """A kernel of `conv_lstm_1x1_backward` for any device, see `reference.conv_lstm_1x1_backward`."""
    if h.numel() == 0:
        return reference.conv_lstm_1x1_backward(
            grad_output, grad_c_last, x, h, c, weight, bias, reset, output, gates, cells, order, precision, output_mask
        )
    layout, batch = common_layout(x), len(h)
    inputs, steps = x.shape[1], len(x) // batch
    before = torch.cat([h, output[:-batch]])
    if reset is not None:
        before = before.masked_fill(reset.flatten()[:, None, None, None], 0)
    xh = torch.cat([x, before], 1)
    pre = torch.conv2d(xh, weight, bias).split(batch)
    cell = cells.transpose(1, 2).unflatten(2, x.shape[2:]).split(batch)
    from_h = weight[:, inputs:].transpose(0, 1)
    d_h, d_c, d_pre = torch.zeros_like(h), grad_c_last, [None] * steps
    for time in range(steps - 1, -1, -1):
        if grad_output is not None:
            d_h = d_h + grad_output[time * batch : (time + 1) * batch]
        d_pre[time], d_c = torch.ops.evkernels.lstm_gates_backward(d_h, d_c, pre[time], cell[time], order)
        d_h = torch.conv2d(d_pre[time], from_h)
        d_h, d_c = _restarted((d_h, d_c), reset, time)
    d_frames = torch.cat(d_pre)
    need_x, _, _, need_weight, need_bias = output_mask
    d_weight = None
    if need_weight:
        _, d_weight, _ = torch.ops.aten.convolution_backward(
            d_frames, xh, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [False, True, False]
        )
    d_x = None
    if need_x:
        from_x = weight[:, :inputs].transpose(0, 1)
        d_x = torch.conv2d(d_frames, from_x) if inputs else torch.zeros_like(x)
    d_bias = d_frames.sum((0, 2, 3)) if need_bias else None
    results = (d_x, d_h, d_c, d_weight, d_bias)
    layouts = (layout, layout, layout, torch.contiguous_format, torch.contiguous_format)
    return tuple(
        d.contiguous(memory_format=form) if wanted else x.new_empty(0)
        for d, form, wanted in zip(results, layouts, output_mask, strict=True)
    )


def _restarted(state: tuple[Tensor, Tensor], reset: Tensor | None, time: int) -> tuple[Tensor, Tensor]:
    if reset is None:
        return state
    mask = reset[time][:, None, None, None]
    return state[0].masked_fill(mask, 0), state[1].masked_fill(mask, 0)
