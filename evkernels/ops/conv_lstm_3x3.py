"""Contract of `conv_lstm_3x3`: documentation, checks, schema, shape rule, gradient and autocast rule.

The registered op takes frames [T*N, ...]: four dimensions, for which PyTorch knows channels_last.
"""

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops import checks, registration
from evkernels.ops.conv_lstm_3x3_composed import composed, composed_backward, in_layouts


def conv_lstm_3x3(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    reset: Tensor | None = None,
    order: str = "ifgo",
) -> tuple[Tensor, Tensor]:
    """A ConvLSTM with a 3x3 convolution over a whole sequence, its gates the epilogue of the convolution.

    Equivalent to::

        output = []
        for t in range(x.shape[0]):
            if reset is not None:
                h, c = (s.masked_fill(reset[t][:, None, None, None], 0) for s in (h, c))
            i, f, g, o = F.conv2d(torch.cat([x[t], h], dim=1), weight, bias, padding=1).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            output.append(h)
        output, c_last = torch.stack(output), c

    Args:
        x: Inputs [T, N, Cin, H, W], T at least 1. float32, bfloat16, float16 or float64; `h`, `weight` and `bias` have
            its dtype, all its device.
        h: Hidden state before the first step [N, C, H, W].
        c: Cell state before the first step [N, C, H, W], in the dtype of `x`, or float32 beside a 16-bit `x`.
        weight: [4*C, Cin + C, 3, 3]: four blocks of C rows in the order named by `order`; the columns of x come first.
        bias: [4*C] or None.
        reset: bool [T, N] or None; where true, the sample's h and c are zero before that step, whatever they held.
        order: Which block is which: a permutation of "ifgo" (input, forget, cell candidate, output).

    Returns:
        output, c_last: h of every step [T, N, C, H, W] in the dtype of `x`, frame by frame channels_last where the
        frames of `x` are, and c after the last step [N, C, H, W] in the dtype of `c`. Never alias the inputs.

    Raises:
        TypeError: if a tensor argument is no tensor or its dtype is not among those above.
        ValueError: if shapes or devices disagree, T is 0 or `order` is no permutation of "ifgo".

    Computed in float32 (float64 for float64); h and c are rounded to their dtypes at every step, so that a sequence
    equals its steps. On the CPU the convolution is Winograd's F(2x2, 3x3): its error is about three times that of a
    direct sum, and a NaN or an infinity reaches up to two pixels instead of one per step. The gradient keeps the gates
    and c of every step (5*C values per pixel). Contiguous and channels_last frames are read in place, other strides are
    copied first. Under autocast all tensors are cast to the autocast dtype except `c`, which becomes float32.
    Deterministic; on the CPU the results have the same bits for any number of threads. Differentiable to any order;
    double backward, forward mode and torch.func run on the reference. Source: Shi et al. 2015 (arXiv:1506.04214), eq. 3
    without peepholes; Lavin and Gray 2016 (arXiv:1509.09308) for the convolution.
    """
    _check(x, h, c, weight, bias, reset, order)
    if registration.needs_reference():
        return reference.conv_lstm_3x3(x, h, c, weight, bias, reset, order)
    tensors = (x, h, c, weight, bias)
    keep = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in tensors)
    output, c_last, _, _ = _forward(x.flatten(0, 1), h, c, weight, bias, reset, order, keep)
    return output.view(*x.shape[:2], *output.shape[1:]), c_last


def check_frames(x, h, reset):
    """Checks what the 3x3 cells have in common, but for dtypes."""
    checks.check_tensor("x", x)
    if x.dim() != 5 or x.shape[0] == 0:
        raise ValueError(f"x must be [T, N, Cin, H, W] with T at least 1, got {tuple(x.shape)}")
    checks.check_tensor("h", h)
    checks.check_same_device("h", h, "x", x)
    if h.dim() != 4 or h.shape[1] == 0:
        raise ValueError(f"h must be [N, C, H, W] with C at least 1, got {tuple(h.shape)}")
    steps, batch, _, *spatial = x.shape
    checks.check_shape("h", h, (batch, h.shape[1], *spatial), "[N, C, H, W] with N, H, W of x")
    if reset is not None:
        checks.check_tensor("reset", reset, (torch.bool,))
        checks.check_same_device("reset", reset, "x", x)
        checks.check_shape("reset", reset, (steps, batch), "[T, N]")


def _check(x, h, c, weight, bias, reset, order):
    checks.check_permutation("order", order, "ifgo")
    check_frames(x, h, reset)
    inputs, channels = x.shape[2], h.shape[1]
    rows = f"with Cin = {inputs}, C = {channels}"
    parameters = {
        "c": (c, h.shape, "of the shape of h"),
        "weight": (weight, (4 * channels, inputs + channels, 3, 3), f"[4*C, Cin + C, 3, 3] {rows}"),
    }
    if bias is not None:
        parameters["bias"] = bias, (4 * channels,), f"[4*C] with C = {channels}"
    for name, (value, shape, meaning) in parameters.items():
        checks.check_tensor(name, value)
        checks.check_same_device(name, value, "x", x)
        checks.check_shape(name, value, shape, meaning)
    if not torch.is_autocast_enabled(x.device.type):
        checks.check_state_dtype("c", c, "x", x)
        for name, value in (("h", h), ("weight", weight), ("bias", bias)):
            if value is not None:
                checks.check_tensor(name, value, (x.dtype,))


def _fake(x, h, c, weight, bias, reset, order, keep):
    layout = registration.common_layout(x)
    frames, _, height, width = x.shape
    channels = h.shape[1]

    def kept(count, dtype):
        if not keep:
            return torch.empty(0, dtype=dtype, device=x.device)
        shape = (frames, count, height, width)
        return torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)

    return (
        torch.empty((frames, channels, height, width), dtype=x.dtype, device=x.device, memory_format=layout),
        torch.empty(c.shape, dtype=c.dtype, device=c.device, memory_format=layout),
        kept(4 * channels, x.dtype),
        kept(channels, c.dtype),
    )


def _fake_backward(grad_output, grad_c_last, x, h, c, weight, bias, reset, output, gates, cells, order, output_mask):
    layout = registration.common_layout(x)
    like = (
        *(torch.empty(v.shape, dtype=v.dtype, device=v.device, memory_format=layout) for v in (x, h, c)),
        torch.empty(weight.shape, dtype=weight.dtype, device=weight.device),
        weight.new_empty(weight.shape[0]),
    )
    return tuple(value if wanted else x.new_empty(0) for value, wanted in zip(like, output_mask, strict=True))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.order, _ = inputs
    results, _, gates, cells = output
    ctx.mark_non_differentiable(gates, cells)
    ctx.save_for_backward(*tensors, results, gates, cells)


def _gradient(ctx, grad_output, grad_c_last, _grad_gates, _grad_cells):
    if grad_output is None and grad_c_last is None:
        return (None,) * 8
    wanted = list(ctx.needs_input_grad[:5])
    # With create_graph the gradient must itself be differentiable: the reference is made of PyTorch's own operators.
    backward = reference.conv_lstm_3x3_backward if torch.is_grad_enabled() else _backward
    gradients = backward(grad_output, grad_c_last, *ctx.saved_tensors, ctx.order, wanted)
    return *(d if needed else None for d, needed in zip(gradients, wanted, strict=True)), None, None, None


def _cast(dtype, x, h, c, weight, bias, *rest):
    return x.to(dtype), h.to(dtype), c.float(), weight.to(dtype), None if bias is None else bias.to(dtype), *rest


def _reference_kernel(x, *rest):
    layout = registration.common_layout(x)
    layouts = (layout, layout, torch.channels_last, torch.channels_last)
    return in_layouts(reference.conv_lstm_3x3_kernel(x, *rest), layouts)


def _reference_input_gradient(grad, weight, _, first, split, count, residual):
    gradient = reference.conv_3x3_input_gradient(grad, weight, first, count)
    # Copies: results of an op must not share memory.
    of_first, of_rest = (part.clone() for part in gradient.split([split, count - split], 1))
    of_rest = of_rest if residual is None else of_rest + residual
    return tuple(part.contiguous(memory_format=torch.channels_last) for part in (of_first, of_rest))


def _fake_input_gradient(grad, weight, packed, first, split, count, residual):
    shapes = ((grad.shape[0], channels, *grad.shape[2:]) for channels in (split, count - split))
    return tuple(
        torch.empty(shape, dtype=grad.dtype, device=grad.device, memory_format=torch.channels_last) for shape in shapes
    )


def _fake_weight_gradient(grad, x, h):
    wide = torch.promote_types(grad.dtype, torch.float32)
    shapes = (grad.shape[1], x.shape[1] + h.shape[1], 3, 3), (grad.shape[1],)
    return tuple(grad.new_empty(shape, dtype=wide) for shape in shapes)


_TENSORS = "Tensor x, Tensor h, Tensor c, Tensor weight, Tensor? bias, Tensor? reset"
_forward = registration.define(
    f"conv_lstm_3x3({_TENSORS}, str order, bool keep) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_kernel,
    fake=_fake,
)
_backward = registration.define(
    f"conv_lstm_3x3_backward(Tensor? grad_output, Tensor? grad_c_last, {_TENSORS}, Tensor output, Tensor gates, "
    "Tensor cells, str order, bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.conv_lstm_3x3_backward,
    fake=_fake_backward,
    layout_of=2,
)
# The convolutions of both cells' gradients, channels_last, and what their kernel on the CPU makes of a weight once for
# all steps.
_gradient_weight = registration.define(
    "conv_3x3_gradient_weight(Tensor weight, int first, int count) -> Tensor",
    reference=lambda weight, first, count: weight.new_empty(0),
    fake=lambda weight, first, count: weight.new_empty(16 * ((count + 63) // 64 * 64) * weight.shape[0]),
)
_input_gradient = registration.define(
    "conv_3x3_input_gradient(Tensor grad, Tensor weight, Tensor packed, int first, int split, int count, "
    "Tensor? residual) -> (Tensor, Tensor)",
    reference=_reference_input_gradient,
    fake=_fake_input_gradient,
)
_weight_gradient = registration.define(
    "conv_3x3_weight_gradient(Tensor grad, Tensor x, Tensor h) -> (Tensor, Tensor)",
    reference=reference.conv_3x3_weight_gradient,
    fake=_fake_weight_gradient,
)
registration.define_composed(_forward, composed)
registration.define_composed(_backward, composed_backward, ("CPU", "CUDA"))
registration.define_composed(_gradient_weight, lambda weight, first, count: weight.new_empty(0))
registration.define_composed(_input_gradient, _reference_input_gradient)
registration.define_composed(_weight_gradient, reference.conv_3x3_weight_gradient)
registration.define_gradient(_forward, setup_context=_setup_context, backward=_gradient)
why = "call evkernels.ops.conv_lstm_3x3 and differentiate with create_graph=True"
registration.forbid_gradient(_backward, why)
registration.forbid_gradient(_gradient_weight, why)
registration.forbid_gradient(_input_gradient, why)
registration.forbid_gradient(_weight_gradient, why)
registration.define_autocast(_forward, _cast)
