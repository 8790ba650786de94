"""Contract of `channel_rms_norm`: documentation, checks, schema, shape rule, gradient and autocast rule."""

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops import checks, registration


def channel_rms_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """RMS norm over the channels of each pixel, with a scale and a shift per channel, in one pass over memory each way.

    Equivalent to::

        rows = x.movedim(1, -1).float()
        y = (F.rms_norm(rows, (x.shape[1],), weight.float(), eps) + bias.float()).movedim(-1, 1).to(x.dtype)

    Args:
        x: [N, C, ...] with C at least 1. float32, bfloat16, float16 or float64. Other sizes may be 0.
        weight: [C], of the dtype of `x`, or float32 beside 16 bits.
        bias: [C], likewise.
        eps: Added to the mean square.

    Returns:
        y: of the shape and dtype of `x`, channels_last where `x` is. Never aliases an input.

    Raises:
        TypeError: if an argument is no tensor of these dtypes.
        ValueError: if `x` is not [N, C, ...], or shapes or devices disagree.

    Computed in float32 (float64 for float64) and rounded once on output; squares that overflow there make the pixel's
    scale zero. Contiguous and channels_last tensors are read in place, of images and of volumes; others are copied.
    Under autocast it runs in the dtype of `x`. Deterministic; on the CPU the same bits for any number of threads.
    Differentiable to any order; the gradient keeps `x` alone and forms the mean squares again. Double backward, forward
    mode and torch.func run on the reference. Source: Zhang and Sennrich 2019 (arXiv:1910.07467); over channels, with a
    shift, VisionCore's RMSNorm.
    """
    checks.check_tensor("x", x)
    if x.dim() < 2 or x.shape[1] == 0:
        raise ValueError(f"x must be [N, C, ...] with C at least 1, got {tuple(x.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        checks.check_tensor(name, value)
        checks.check_state_dtype(name, value, "x", x)
        checks.check_same_device(name, value, "x", x)
        checks.check_shape(name, value, (x.shape[1],), "[C]")
    if registration.needs_reference():
        return reference.channel_rms_norm(x, weight, bias, eps)
    if x.dim() != 5:
        return registration.call(_forward, x, weight, bias, eps)
    # Frames are further rows: a volume in channels_last becomes an image in channels_last.
    return registration.call(_forward, x.flatten(2, 3), weight, bias, eps).unflatten(2, x.shape[2:4])


def _fake(x, weight, bias, eps):
    return torch.empty_like(x, memory_format=registration.common_layout(x))


def _fake_backward(grad_output, x, weight, bias, eps):
    return _fake(x, weight, bias, eps), weight.new_empty(weight.shape), bias.new_empty(bias.shape)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, grad_output):
    if grad_output is None:
        return (None,) * 4
    # With create_graph the gradient must itself be differentiable: the reference is made of PyTorch's own operators.
    backward = reference.channel_rms_norm_backward if torch.is_grad_enabled() else _backward
    gradients = backward(grad_output, *ctx.saved_tensors, ctx.eps)
    return *(d if need else None for d, need in zip(gradients, ctx.needs_input_grad[:3], strict=True)), None


_ARGUMENTS = "Tensor x, Tensor weight, Tensor bias, float eps"
_forward = registration.define(
    f"channel_rms_norm({_ARGUMENTS}) -> Tensor", reference=reference.channel_rms_norm, fake=_fake, layout_of=0
)
_backward = registration.define(
    f"channel_rms_norm_backward(Tensor grad_output, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    reference=reference.channel_rms_norm_backward,
    fake=_fake_backward,
    layout_of=1,
)
# On GPUs the reference serves, of which torch.compile makes one pass over memory.
for _op in (_forward, _backward):
    registration.define_composed(_op, registration.default_kernels[_op.name().partition("::")[2]])
registration.define_gradient(_forward, setup_context=_setup_context, backward=_gradient)
registration.forbid_gradient(_backward, "call evkernels.ops.channel_rms_norm and differentiate with create_graph=True")
registration.define_autocast(_forward, lambda dtype, *arguments: arguments)
