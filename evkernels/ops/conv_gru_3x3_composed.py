"""`conv_gru_3x3` and its gradient, composed of registered ops and a library's convolutions.

Forward, they serve the backends that have no kernel of their own. The gradient is composed everywhere: per step the
gates and two convolutions each way, while the gates' gradients are in the cache. All of it is channels_last, because
the CPU's kernel keeps the gates so.
"""

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops.conv_lstm_3x3_composed import InputGradient, ParameterGradients, before_steps, in_layouts
from evkernels.ops.registration import common_layout
from evkernels.reference.conv_lstm_3x3 import restarted


def composed(
    x: Tensor,
    h: Tensor,
    weight_z: Tensor,
    bias_z: Tensor | None,
    weight_r: Tensor,
    bias_r: Tensor | None,
    weight_n: Tensor,
    bias_n: Tensor | None,
    reset: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """A kernel of `conv_gru_3x3` for any device, see `reference.conv_gru_3x3_kernel`."""
    layouts = (common_layout(x), torch.channels_last, torch.channels_last)
    if h.numel() == 0:  # conv2d takes no empty images
        gates = (weight_z, bias_z, weight_r, bias_r, weight_n, bias_n)
        return in_layouts(reference.conv_gru_3x3_kernel(x, h, *gates, reset, keep), layouts)
    outputs, zrs, ns = [], [], []
    for time, frame in enumerate(x.split(len(h))):
        (h,) = restarted((h,), reset, time)
        xh = torch.cat([frame, h.to(x.dtype)], 1)
        gates = [torch.conv2d(xh, *gate, padding=1) for gate in ((weight_z, bias_z), (weight_r, bias_r))]
        zr = torch.cat(gates, 1)
        z, rh = torch.ops.evkernels.gru_reset(zr, h, "zr")
        n = torch.conv2d(torch.cat([frame, rh], 1), weight_n, bias_n, padding=1)
        h = torch.ops.evkernels.gru_update(z, n, h)
        outputs.append(h)
        if keep:
            zrs.append(zr)
            ns.append(n)
    kept = (torch.cat(zrs), torch.cat(ns)) if keep else (x.new_empty(0), x.new_empty(0))
    return in_layouts((torch.cat(outputs), *kept), layouts)


def composed_backward(
    grad_output: Tensor,
    x: Tensor,
    h: Tensor,
    weight_z: Tensor,
    bias_z: Tensor | None,
    weight_r: Tensor,
    bias_r: Tensor | None,
    weight_n: Tensor,
    bias_n: Tensor | None,
    reset: Tensor | None,
    output: Tensor,
    zr: Tensor,
    n: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """A kernel of `conv_gru_3x3_backward` for any device, see `reference.conv_gru_3x3_backward`."""
    layouts = (common_layout(x),) * 2 + (torch.contiguous_format,) * 6
    if h.numel() == 0:
        gates = (weight_z, bias_z, weight_r, bias_r, weight_n, bias_n)
        arguments = (grad_output, x, h, *gates, reset, output, zr, n, output_mask)
        return in_layouts(reference.conv_gru_3x3_backward(*arguments), layouts)
    batch, inputs = len(h), x.shape[1]
    ops = torch.ops.evkernels
    need_x, need_h, *need = output_mask
    weight_zr = torch.cat([weight_z, weight_r])
    gradient_zr, gradient_n = (InputGradient(weight, inputs, need_x) for weight in (weight_zr, weight_n))
    parameters_zr = ParameterGradients(weight_zr, [need[0] or need[2], need[1] or need[3]])
    parameters_n = ParameterGradients(weight_n, need[4:])
    d_x = torch.empty_like(x, memory_format=torch.channels_last) if need_x else None
    d_h = torch.zeros_like(h)
    gradients, frames, zr, n = (value.split(batch) for value in (grad_output, x, zr, n))
    parts = gradients, frames, before_steps(h, output, reset), zr, n
    for time, (arriving, frame, state, zr_now, n_now) in reversed(list(enumerate(zip(*parts, strict=True)))):
        z, rh = ops.gru_reset(zr_now, state, "zr")
        d_z, d_n, d_state = ops.gru_update_backward(d_h + arriving, z, n_now, state)
        parameters_n.add(d_n, frame, rh)
        d_x_n, d_rh = gradient_n(d_n)
        d_zr, d_h = ops.gru_reset_backward(d_z, d_rh, zr_now, state, "zr")
        parameters_zr.add(d_zr, frame, state)
        if time or need_x or need_h:
            d_x_zr, d_h = gradient_zr(d_zr, d_h + d_state)
            if need_x:
                torch.add(d_x_n, d_x_zr, out=d_x[time * batch : (time + 1) * batch])
        (d_h,) = restarted((d_h,), reset, time)
    # Copies: results of an op must not share memory.
    by_gate = ([None, None] if d is None else [half.clone() for half in d.chunk(2)] for d in parameters_zr.sums())
    (d_weight_z, d_weight_r), (d_bias_z, d_bias_r) = by_gate
    results = (d_x, d_h, d_weight_z, d_bias_z, d_weight_r, d_bias_r, *parameters_n.sums())
    return in_layouts(
        [d if wanted else x.new_empty(0) for d, wanted in zip(results, output_mask, strict=True)], layouts
    )
