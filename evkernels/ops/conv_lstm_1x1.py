"""Contract of `conv_lstm_1x1`: documentation, checks, schema, shape rule, gradient and autocast rule.

The registered op takes frames [T*N, ...]: four dimensions, for which PyTorch knows channels_last.
"""

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops import checks, registration
from evkernels.ops.conv_lstm_1x1_composed import composed, composed_backward


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
    """A ConvLSTM with a 1x1 convolution over a whole sequence, fused: the gates' pre-activations stay in registers.

    Equivalent to::

        output = []
        for t in range(x.shape[0]):
            if reset is not None:
                h, c = (s.masked_fill(reset[t][:, None, None, None], 0) for s in (h, c))
            i, f, g, o = F.conv2d(torch.cat([x[t], h], dim=1), weight, bias).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            output.append(h)
        output, c_last = torch.stack(output), c

    Args:
        x: Inputs [T, N, Cin, H, W], T at least 1. float32, bfloat16, float16 or float64; `h`, `weight` and `bias` have
            its dtype, all its device.
        h: Hidden state before the first step [N, C, H, W].
        c: Cell state before the first step [N, C, H, W], in the dtype of `x`, or float32 beside a 16-bit `x`.
        weight: [4*C, Cin + C, 1, 1]: four blocks of C rows in the order named by `order`; the columns of x come first.
        bias: [4*C] or None.
        reset: bool [T, N] or None; where true, the sample's h and c are zero before that step, whatever they held.
        order: Which block is which: a permutation of "ifgo" (input, forget, cell candidate, output).
        save: What the gradient keeps of every step beside the arguments and the output: "gates" is c and the activated
            gates of up to 65 % of the channels (3 to 3.5*C values per pixel where plain PyTorch keeps 8*C), "recompute"
            c alone (C values), for a product more of the other channels.

    Returns:
        output, c_last: h of every step [T, N, C, H, W] in the dtype of `x`, frame by frame channels_last where the
        frames of `x` are, and c after the last step [N, C, H, W] in the dtype of `c`. Never alias the inputs.

    Raises:
        TypeError: if a tensor argument is no tensor or its dtype is not among those above.
        ValueError: if shapes or devices disagree, T is 0, `order` is no permutation of "ifgo" or `save` is neither.

    Computed in float32 (float64 for float64); h and c are rounded to their dtypes at every step, so that a sequence
    equals its steps; the gradient may round those of the gates to bfloat16 beside a bfloat16 `x`. Contiguous and
    channels_last frames are read in place, other strides are copied first. Under autocast all tensors are cast to the
    autocast dtype except `c`, which becomes float32. Deterministic; on the CPU the results and gradients have the
    same bits for any number of threads. Differentiable to any order; double backward, forward mode and torch.func run
    on the reference. Source: Shi et al. 2015 (arXiv:1506.04214), eq. 3 without peepholes.
    """
    _check(x, h, c, weight, bias, reset, order, save)
    if registration.needs_reference():
        return reference.conv_lstm_1x1(x, h, c, weight, bias, reset, order, save)
    tensors = (x, h, c, weight, bias)
    trains = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in tensors)
    save = save if trains else "none"
    precision = registration.matmul_precision()
    output, c_last, _, _ = _forward(x.flatten(0, 1), h, c, weight, bias, reset, order, save, precision)
    return output.view(*x.shape[:2], *output.shape[1:]), c_last


def _check(x, h, c, weight, bias, reset, order, save):
    checks.check_permutation("order", order, "ifgo")
    if save not in ("gates", "recompute"):
        raise ValueError(f"save must be 'gates' or 'recompute', got {save!r}")
    checks.check_tensor("x", x)
    if x.dim() != 5 or x.shape[0] == 0:
        raise ValueError(f"x must be [T, N, Cin, H, W] with T at least 1, got {tuple(x.shape)}")
    autocast = torch.is_autocast_enabled(x.device.type)
    for name, value in (("h", h), ("c", c), ("weight", weight), ("bias", bias)):
        if name == "bias" and value is None:
            continue
        checks.check_tensor(name, value)
        checks.check_same_device(name, value, "x", x)
        if not autocast:
            if name == "c":
                checks.check_state_dtype("c", c, "x", x)
            else:
                checks.check_tensor(name, value, (x.dtype,))
    if h.dim() != 4 or h.shape[1] == 0:
        raise ValueError(f"h must be [N, C, H, W] with C at least 1, got {tuple(h.shape)}")
    (steps, batch, inputs, *spatial), channels = x.shape, h.shape[1]
    checks.check_shape("h", h, (batch, channels, *spatial), "[N, C, H, W] with N, H, W of x")
    checks.check_shape("c", c, h.shape, "of the shape of h")
    expected = (4 * channels, inputs + channels, 1, 1)
    checks.check_shape("weight", weight, expected, f"[4*C, Cin + C, 1, 1] with Cin = {inputs}, C = {channels}")
    if bias is not None:
        checks.check_shape("bias", bias, (4 * channels,), f"[4*C] with C = {channels}")
    if reset is not None:
        checks.check_tensor("reset", reset, (torch.bool,))
        checks.check_same_device("reset", reset, "x", x)
        checks.check_shape("reset", reset, (steps, batch), "[T, N]")


def _fake(x, h, c, weight, bias, reset, order, save, precision):
    layout = registration.common_layout(x)
    frames, _, height, width = x.shape
    channels = h.shape[1]
    return (
        torch.empty((frames, channels, height, width), dtype=x.dtype, device=x.device, memory_format=layout),
        torch.empty(c.shape, dtype=c.dtype, device=c.device, memory_format=layout),
        x.new_empty((frames, height * width, 4 * reference.kept_channels(channels)) if save == "gates" else 0),
        c.new_empty((frames, height * width, channels) if save != "none" else 0),
    )


def _fake_backward(
    grad_output, grad_c_last, x, h, c, weight, bias, reset, output, gates, cells, order, precision, output_mask
):
    layout = registration.common_layout(x)
    like = (
        *(torch.empty(v.shape, dtype=v.dtype, device=v.device, memory_format=layout) for v in (x, h, c)),
        weight.new_empty(weight.shape),
        weight.new_empty(weight.shape[0]),
    )
    return tuple(value if wanted else x.new_empty(0) for value, wanted in zip(like, output_mask, strict=True))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.order, _, ctx.precision = inputs
    results, _, gates, cells = output
    ctx.mark_non_differentiable(gates, cells)
    ctx.save_for_backward(*tensors, results, gates, cells)


def _gradient(ctx, grad_output, grad_c_last, _grad_gates, _grad_cells):
    if grad_output is None and grad_c_last is None:
        return (None,) * 9
    wanted = list(ctx.needs_input_grad[:5])
    # With create_graph the gradient must itself be differentiable: the reference is made of PyTorch's own operators.
    backward = reference.conv_lstm_1x1_backward if torch.is_grad_enabled() else _backward
    gradients = backward(grad_output, grad_c_last, *ctx.saved_tensors, ctx.order, ctx.precision, wanted)
    return *(d if needed else None for d, needed in zip(gradients, wanted, strict=True)), None, None, None, None


def _cast(dtype, x, h, c, weight, bias, *rest):
    return x.to(dtype), h.to(dtype), c.float(), weight.to(dtype), None if bias is None else bias.to(dtype), *rest


_TENSORS = "Tensor x, Tensor h, Tensor c, Tensor weight, Tensor? bias, Tensor? reset"
_forward = registration.define(
    f"conv_lstm_1x1({_TENSORS}, str order, str save, str precision) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=reference.conv_lstm_1x1_kernel,
    fake=_fake,
    layout_of=0,
)
_backward = registration.define(
    f"conv_lstm_1x1_backward(Tensor? grad_output, Tensor? grad_c_last, {_TENSORS}, Tensor output, Tensor gates, "
    "Tensor cells, str order, str precision, bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.conv_lstm_1x1_backward,
    fake=_fake_backward,
    layout_of=2,
)
registration.define_composed(_forward, composed)
registration.define_composed(_backward, composed_backward)
registration.define_gradient(_forward, setup_context=_setup_context, backward=_gradient)
registration.forbid_gradient(_backward, "call evkernels.ops.conv_lstm_1x1 and differentiate with create_graph=True")
registration.define_autocast(_forward, _cast)
