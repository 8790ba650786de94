"""Contract of `conv_gru_3x3`: documentation, checks, schema, shape rule, gradient and autocast rule.

The registered op takes frames [T*N, ...]: four dimensions, for which PyTorch knows channels_last.
"""

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops import checks, registration
from evkernels.ops.conv_gru_3x3_composed import composed, composed_backward
from evkernels.ops.conv_lstm_3x3 import check_frames
from evkernels.ops.conv_lstm_3x3_composed import in_layouts


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
    """A classic ConvGRU with 3x3 convolutions over a whole sequence, its gates the epilogues of the convolutions.

    Equivalent to::

        output = []
        for t in range(x.shape[0]):
            if reset is not None:
                h = h.masked_fill(reset[t][:, None, None, None], 0)
            z, r = (F.conv2d(torch.cat([x[t], h], 1), *g, padding=1) for g in ((weight_z, bias_z), (weight_r, bias_r)))
            n = F.conv2d(torch.cat([x[t], r.sigmoid() * h], dim=1), weight_n, bias_n, padding=1)
            h = (1 - z.sigmoid()) * h + z.sigmoid() * n.tanh()
            output.append(h)
        output = torch.stack(output)

    Args:
        x: Inputs [T, N, Cin, H, W], T at least 1. float32, bfloat16, float16 or float64; weights and biases have its
            dtype, all its device.
        h: State before the first step [N, C, H, W], in the dtype of `x`, or float32 beside a 16-bit `x`.
        weight_z, bias_z, weight_r, bias_r, weight_n, bias_n: Of the update gate, the reset gate and the candidate:
            weights [C, Cin + C, 3, 3], the columns of x first, and biases [C] or None.
        reset: bool [T, N] or None; where true, the sample's h is zero before that step, whatever it held.

    Returns:
        h of every step [T, N, C, H, W] in the dtype of `h`, frame by frame channels_last where the frames of `x` are.
        Never aliases an input.

    Raises:
        TypeError: if a tensor argument is no tensor or its dtype is not among those above.
        ValueError: if shapes or devices disagree or T is 0.

    Computed in float32 (float64 for float64); h is rounded to its dtype at every step, so that a sequence equals its
    steps. On the CPU the convolutions are Winograd's F(2x2, 3x3): their error is about three times that of a direct
    sum, and a NaN or an infinity reaches up to two pixels instead of one per convolution. The gradient keeps the gates
    of every step (3*C values per pixel). Contiguous and channels_last frames are read in place, other strides are
    copied first. Under autocast all tensors are cast to the autocast dtype except `h`, which becomes float32.
    Deterministic; on the CPU the results have the same bits for any number of threads. Differentiable to any order;
    double backward, forward mode and torch.func run on the reference. Source: Ballas et al. 2016 (arXiv:1511.06432),
    the form of E2VID and FireNet; Lavin and Gray 2016 (arXiv:1509.09308) for the convolution.
    """
    gates = {"z": (weight_z, bias_z), "r": (weight_r, bias_r), "n": (weight_n, bias_n)}
    _check(x, h, gates, reset)
    tensors = (x, h, weight_z, bias_z, weight_r, bias_r, weight_n, bias_n)
    if registration.needs_reference():
        return reference.conv_gru_3x3(*tensors, reset)
    keep = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in tensors)
    output, _, _ = _forward(x.flatten(0, 1), *tensors[1:], reset, keep)
    return output.view(*x.shape[:2], *output.shape[1:])


def _check(x, h, gates, reset):
    check_frames(x, h, reset)
    autocast = torch.is_autocast_enabled(x.device.type)
    if not autocast:
        checks.check_state_dtype("h", h, "x", x)
    inputs, channels = x.shape[2], h.shape[1]
    for gate, (weight, bias) in gates.items():
        expected = (channels, inputs + channels, 3, 3), f"[C, Cin + C, 3, 3] with Cin = {inputs}, C = {channels}"
        parameters = {f"weight_{gate}": (weight, *expected)}
        if bias is not None:
            parameters[f"bias_{gate}"] = bias, (channels,), f"[C] with C = {channels}"
        for name, (value, shape, meaning) in parameters.items():
            checks.check_tensor(name, value, checks.FLOATING if autocast else (x.dtype,))
            checks.check_same_device(name, value, "x", x)
            checks.check_shape(name, value, shape, meaning)


def _fake(x, h, weight_z, bias_z, weight_r, bias_r, weight_n, bias_n, reset, keep):
    frames, _, height, width = x.shape
    channels = h.shape[1]

    def empty(count, dtype, layout, needed=True):
        if not needed:
            return torch.empty(0, dtype=dtype, device=x.device)
        return torch.empty((frames, count, height, width), dtype=dtype, device=x.device, memory_format=layout)

    return (
        empty(channels, h.dtype, registration.common_layout(x)),
        empty(2 * channels, x.dtype, torch.channels_last, keep),
        empty(channels, x.dtype, torch.channels_last, keep),
    )


def _fake_backward(grad_output, x, h, *rest):
    *gates, _, _, _, _, output_mask = rest
    layout = registration.common_layout(x)
    images = (torch.empty(v.shape, dtype=v.dtype, device=v.device, memory_format=layout) for v in (x, h))
    parameters = (
        torch.empty(weight.shape[: 4 - 3 * is_bias], dtype=x.dtype, device=x.device)
        for weight in gates[::2]
        for is_bias in (0, 1)
    )
    like = (*images, *parameters)
    return tuple(value if wanted else x.new_empty(0) for value, wanted in zip(like, output_mask, strict=True))


def _setup_context(ctx, inputs, output):
    *tensors, _ = inputs
    results, zr, n = output
    ctx.mark_non_differentiable(zr, n)
    ctx.save_for_backward(*tensors, results, zr, n)


def _gradient(ctx, grad_output, _grad_zr, _grad_n):
    if grad_output is None:
        return (None,) * 10
    wanted = list(ctx.needs_input_grad[:8])
    # With create_graph the gradient must itself be differentiable: the reference is made of PyTorch's own operators.
    backward = reference.conv_gru_3x3_backward if torch.is_grad_enabled() else _backward
    gradients = backward(grad_output, *ctx.saved_tensors, wanted)
    return *(d if needed else None for d, needed in zip(gradients, wanted, strict=True)), None, None


def _cast(dtype, x, h, *rest):
    *gates, reset, keep = rest
    return x.to(dtype), h.float(), *(None if gate is None else gate.to(dtype) for gate in gates), reset, keep


def _reference_kernel(x, *rest):
    layouts = (registration.common_layout(x), torch.channels_last, torch.channels_last)
    return in_layouts(reference.conv_gru_3x3_kernel(x, *rest), layouts)


_TENSORS = (
    "Tensor x, Tensor h, Tensor weight_z, Tensor? bias_z, Tensor weight_r, Tensor? bias_r, Tensor weight_n, "
    "Tensor? bias_n, Tensor? reset"
)
_forward = registration.define(
    f"conv_gru_3x3({_TENSORS}, bool keep) -> (Tensor, Tensor, Tensor)", reference=_reference_kernel, fake=_fake
)
_backward = registration.define(
    f"conv_gru_3x3_backward(Tensor grad_output, {_TENSORS}, Tensor output, Tensor zr, Tensor n, bool[8] output_mask) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.conv_gru_3x3_backward,
    fake=_fake_backward,
    layout_of=1,
)
registration.define_composed(_forward, composed)
registration.define_composed(_backward, composed_backward, ("CPU", "CUDA"))
registration.define_gradient(_forward, setup_context=_setup_context, backward=_gradient)
registration.forbid_gradient(_backward, "call evkernels.ops.conv_gru_3x3 and differentiate with create_graph=True")
registration.define_autocast(_forward, _cast)
