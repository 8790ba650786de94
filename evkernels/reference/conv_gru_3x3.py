"""Definition of the classic 3x3 ConvGRU over a whole sequence: forward and hand-written backward in plain PyTorch.

The functions named `_kernel` are what the registered op computes: frames [T*N, ...] instead of [T, N, ...] and, beside
the result, what the gradient keeps.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from evkernels.reference.conv_lstm_3x3 import conv_3x3_input_gradient, convolved, restarted, weight_gradient
from evkernels.reference.gru_gates import gru_reset, gru_reset_backward, gru_update, gru_update_backward

Gate = tuple[Tensor, Tensor | None]


def conv_gru_3x3(
    x: Tensor,
    h: Tensor,
    weight_z: Tensor,
    bias_z: Tensor | None,
    weight_r: Tensor,
    bias_r: Tensor | None,
    weight_n: Tensor,
    bias_n: Tensor | None,
    reset: Tensor | None = None,
) -> Tensor:
    outputs = []
    gates = ((weight_z, bias_z), (weight_r, bias_r), (weight_n, bias_n))
    for time, frame in enumerate(x):
        (h,) = restarted((h,), reset, time)
        h = _step(frame, h, gates)[0]
        outputs.append(h)
    return torch.stack(outputs)


def conv_gru_3x3_kernel(
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
    """Output [T*N, C, H, W] and, if `keep`, the pre-activations of z and r [T*N, 2*C, H, W] and of n [T*N, C, H, W];
    empty otherwise.
    """
    outputs, zrs, ns = [], [], []
    gates = ((weight_z, bias_z), (weight_r, bias_r), (weight_n, bias_n))
    for time, frame in enumerate(x.split(max(len(h), 1))):
        (h,) = restarted((h,), reset, time)
        h, zr, n, _ = _step(frame, h, gates)
        for kept, value in ((outputs, h), (zrs, zr.to(x.dtype)), (ns, n.to(x.dtype))):
            kept.append(value)
    kept = (torch.cat(zrs), torch.cat(ns)) if keep else (x.new_empty(0), x.new_empty(0))
    return torch.cat(outputs), *kept


def conv_gru_3x3_backward(
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
    output_mask: Sequence[bool] = (True,) * 8,
) -> tuple[Tensor, ...]:
    """Gradients of the first eight arguments of `conv_gru_3x3_kernel`; those that `output_mask` leaves out are empty.

    Uses neither `zr` nor `n`, so that it is differentiable itself.
    """
    batch = max(len(h), 1)
    frames = x.split(batch)
    gates = ((weight_z, bias_z), (weight_r, bias_r), (weight_n, bias_n))
    wide = torch.promote_types(x.dtype, torch.float32)
    states, before = [], h
    for time, frame in enumerate(frames):
        states.append(restarted((before,), reset, time)[0])
        before = _step(frame, states[-1], gates)[0]
    d_h = torch.zeros_like(h, dtype=wide)
    weight_zr, weight_n = torch.cat([weight_z, weight_r]).to(wide), weight_n.to(wide)
    d_weight_zr, d_weight_n = torch.zeros_like(weight_zr), torch.zeros_like(weight_n)
    d_bias_zr, d_bias_n = weight_zr.new_zeros(len(weight_zr)), weight_n.new_zeros(len(weight_n))
    d_x = []
    of_x, of_h = (0, x.shape[1]), (x.shape[1], h.shape[1])
    for time in range(len(frames) - 1, -1, -1):
        d_h = d_h + grad_output[time * batch : (time + 1) * batch]
        state = states[time].to(wide)
        _, zr, n, rh = _step(frames[time], state, gates)
        frame = frames[time].to(wide)
        d_z, d_n, d_state = gru_update_backward(d_h, gru_reset(zr, state)[0], n, state)
        d_rh = conv_3x3_input_gradient(d_n, weight_n, *of_h)
        d_zr, d_from_reset = gru_reset_backward(d_z, d_rh, zr, state)
        d_from_zr = conv_3x3_input_gradient(d_zr, weight_zr, *of_h)
        d_x.append(conv_3x3_input_gradient(d_n, weight_n, *of_x) + conv_3x3_input_gradient(d_zr, weight_zr, *of_x))
        d_weight_zr = d_weight_zr + weight_gradient(torch.cat([frame, state], 1), weight_zr, d_zr)
        d_weight_n = d_weight_n + weight_gradient(torch.cat([frame, rh], 1), weight_n, d_n)
        d_bias_zr, d_bias_n = d_bias_zr + d_zr.sum((0, 2, 3)), d_bias_n + d_n.sum((0, 2, 3))
        (d_h,) = restarted((d_state + d_from_reset + d_from_zr,), reset, time)
    # Copies: results of an op must not share memory.
    d_weight_z, d_weight_r, d_bias_z, d_bias_r = (
        d.clone() for joined in (d_weight_zr, d_bias_zr) for d in joined.chunk(2)
    )
    d_gates = (d_weight_z, d_bias_z, d_weight_r, d_bias_r, d_weight_n, d_bias_n)
    gradients = (torch.cat(d_x[::-1]).to(x.dtype), d_h.to(h.dtype), *(d.to(x.dtype) for d in d_gates))
    return tuple(d if wanted else x.new_empty(0) for d, wanted in zip(gradients, output_mask, strict=True))


def _step(x: Tensor, h: Tensor, gates: Sequence[Gate]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, the pre-activations of z and r and of n, and r*h. h is rounded to its dtype at every step."""
    wide = torch.promote_types(x.dtype, torch.float32)
    frame, state = x.to(wide), h.to(wide)
    xh = torch.cat([frame, state], 1)
    zr = torch.cat([convolved(xh, *gate) for gate in gates[:2]], 1)
    z, rh = gru_reset(zr, state)
    n = convolved(torch.cat([frame, rh], 1), *gates[2])
    return gru_update(z, n, state).to(h.dtype), zr, n, rh
