"""Contract of `channel_attention`: documentation, checks, schema, shape rule, gradient and autocast rule."""

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops import checks, registration
from evkernels.ops.depthwise_conv2d import check_beside


def channel_attention(x: Tensor, reduce_weight: Tensor, expand_weight: Tensor) -> Tensor:
    """Scales each channel by a number between 0 and 1 that a small network forms of all channels' means.

    Equivalent to::

        means = x.mean((2, 3), keepdim=True)
        y = x * F.conv2d(F.gelu(F.conv2d(means, reduce_weight)), expand_weight).sigmoid()

    Args:
        x: Input [N, C, H, W], not empty. float32, bfloat16, float16 or float64; both weights have its dtype and device.
        reduce_weight: [R, C, 1, 1], R at least 1.
        expand_weight: [C, R, 1, 1].

    Returns:
        y: of the shape and dtype of `x`, channels_last where `x` is. Never aliases an input.

    Raises:
        TypeError: if an argument is no tensor or its dtype is not that of `x`.
        ValueError: if shapes or devices disagree.

    On the CPU sums over tiles of pixels are added up, and the network is computed, in float64; the rest is in float32
    (float64 for float64). Kept for the gradient are `x` and the means. The CPU kernel works in channels_last, other
    layouts are copied; without a kernel PyTorch's operators compute. Under autocast all tensors are cast to the
    autocast dtype. Deterministic: on the CPU the same bits for any number of threads. Differentiable to any order;
    double backward, forward mode and torch.func run on the reference. Source: Hu et al. 2018 (arXiv:1709.01507),
    section 3, without biases and with a GELU, as in EfficientConvLSTM.
    """
    checks.check_tensor("x", x)
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"x must be [N, C, H, W] and not empty, got {tuple(x.shape)}")
    check_beside("reduce_weight", reduce_weight, x)
    check_beside("expand_weight", expand_weight, x)
    channels, narrow = x.shape[1], reduce_weight.shape[0] if reduce_weight.dim() else 0
    if narrow == 0:
        raise ValueError(f"reduce_weight must be [R, C, 1, 1] with R >= 1, got {tuple(reduce_weight.shape)}")
    checks.check_shape("reduce_weight", reduce_weight, (narrow, channels, 1, 1), "[R, C, 1, 1]")
    checks.check_shape("expand_weight", expand_weight, (channels, narrow, 1, 1), "[C, R, 1, 1]")
    function = reference.channel_attention if registration.needs_reference() else _forward
    return function(x, reduce_weight, expand_weight)[0]


def _fake(x, reduce_weight, expand_weight):
    means = x.new_empty(x.shape[:2], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x, memory_format=registration.common_layout(x)), means


def _fake_backward(grad_output, x, reduce_weight, expand_weight, means):
    d_x = torch.empty_like(x, memory_format=registration.common_layout(x))
    return d_x, x.new_empty(reduce_weight.shape), x.new_empty(expand_weight.shape)


def _setup_context(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _gradient(ctx, grad_output, _):
    if grad_output is None:
        return (None,) * 3
    *tensors, means = ctx.saved_tensors
    backward = _backward
    if torch.is_grad_enabled():
        # With create_graph the gradient must itself be differentiable, through the means too.
        backward = reference.channel_attention_backward
        _, means = reference.channel_attention(*tensors)
    gradients = backward(grad_output, *tensors, means)
    return tuple(d if need else None for d, need in zip(gradients, ctx.needs_input_grad, strict=True))


def _reference(x, *weights):
    y, means = reference.channel_attention(x, *weights)
    return y.contiguous(memory_format=registration.common_layout(x)), means.contiguous()


def _reference_backward(grad_output, x, *others):
    d_x, *weights = reference.channel_attention_backward(grad_output, x, *others)
    return d_x.contiguous(memory_format=registration.common_layout(x)), *(value.contiguous() for value in weights)


_ARGUMENTS = "Tensor x, Tensor reduce_weight, Tensor expand_weight"
_forward = registration.define(f"channel_attention({_ARGUMENTS}) -> (Tensor, Tensor)", reference=_reference, fake=_fake)
_backward = registration.define(
    f"channel_attention_backward(Tensor grad_output, {_ARGUMENTS}, Tensor means) -> (Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
)
# Backends without a kernel run on PyTorch's own operators.
registration.define_composed(_forward, _reference)
registration.define_composed(_backward, _reference_backward)
registration.define_gradient(_forward, setup_context=_setup_context, backward=_gradient)
registration.forbid_gradient(_backward, "call evkernels.ops.channel_attention and differentiate with create_graph=True")
registration.define_autocast(_forward, lambda dtype, *tensors: tuple(value.to(dtype) for value in tensors))
