"""Contract of `separable_conv2d`: documentation, checks, schema, shape rule, gradient and autocast rule."""

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops import checks, registration
from evkernels.ops.depthwise_conv2d import check_activation, check_beside, check_depthwise, check_padding, output_shape
from evkernels.ops.separable_conv2d_composed import composed_backward, composed_training


def separable_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None = None,
    pointwise_bias: Tensor | None = None,
    stride: int = 1,
    padding: int | None = None,
    activation: str = "none",
    output_activation: str = "none",
) -> Tensor:
    """Depthwise k x k convolution, activation, 1 x 1 convolution and activation, fused: the depthwise result stays in
    the cache.

    Equivalent to::

        a = activation(F.conv2d(x, depthwise_weight, depthwise_bias, stride, padding, groups=x.shape[1]))
        y = output_activation(F.conv2d(a, pointwise_weight, pointwise_bias))

    Args:
        x: Input [N, C, H, W] of at least one channel. float32, bfloat16, float16 or float64; the weights and biases
            have its dtype and device.
        depthwise_weight: One filter per channel [C, 1, k, k], k odd and at most 31.
        pointwise_weight: [O, C, 1, 1].
        depthwise_bias: [C] or None.
        pointwise_bias: [O] or None.
        stride: 1 or 2, in both directions.
        padding: Rows and columns of zeros added at each border; None is k // 2.
        activation: What follows the depthwise convolution: "none", "relu", "silu", "gelu"
            (exact, with erf), "gelu_tanh" or "sigmoid".
        output_activation: What follows the pointwise convolution, of the same choice.

    Returns:
        y: [N, O, H', W'] with H' = (H + 2*padding - k) // stride + 1, in the dtype of `x`. Never aliases the inputs.
        channels_last where `x` is, contiguous otherwise.

    Raises:
        TypeError: if a tensor argument is no tensor or its dtype is not that of `x`, or stride or padding is no int.
        ValueError: if shapes or devices disagree, an activation or stride is not among those above, or the kernel is
            larger than the padded input.

    Computed in float32 (float64 for float64) and rounded once on output. Contiguous and channels_last inputs are read
    in place, other strides are copied first. Under autocast all tensors are cast to the autocast dtype. Deterministic;
    on the CPU the output and the gradients have the same bits for any number of threads. Differentiable to any order;
    the gradient recomputes the depthwise result and keeps the arguments and, on the CPU in float32 at stride 1 from 128
    channels on, the pointwise result before `output_activation`, which costs more to recompute. Double backward,
    forward mode and torch.func run on the reference. Source: Howard et al. 2017 (arXiv:1704.04861), section 3.1.
    """
    check_depthwise("depthwise_", x, depthwise_weight, depthwise_bias, stride, activation)
    check_activation("output_activation", output_activation)
    check_beside("pointwise_weight", pointwise_weight, x)
    channels = x.shape[1]
    if pointwise_weight.dim() != 4 or pointwise_weight.shape[0] == 0 or pointwise_weight.shape[1:] != (channels, 1, 1):
        raise ValueError(
            f"pointwise_weight must be [O, C, 1, 1] with C = x.shape[1] = {channels}, "
            f"got {tuple(pointwise_weight.shape)}"
        )
    if pointwise_bias is not None:
        check_beside("pointwise_bias", pointwise_bias, x)
        outputs = pointwise_weight.shape[0]
        checks.check_shape(
            "pointwise_bias", pointwise_bias, (outputs,), f"[O] with O = pointwise_weight.shape[0] = {outputs}"
        )
    padding = check_padding(x, depthwise_weight, padding)
    arguments = (x, *(depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias), stride, padding)
    if registration.needs_reference():
        return reference.separable_conv2d(*arguments, activation, output_activation)
    if output_activation != "none" and stride == 1 and _keeps_result(arguments[:5]):
        return _training(*arguments, activation, output_activation)[0]
    return registration.call(_forward, *arguments, activation, output_activation)


# From as many channels on a product takes so much longer than writing its result and reading it again that a step gains
# a tenth; at 64 it gains nothing. At stride 2 the step would then need as much memory as plain PyTorch's, where output
# and input gradient alone need three quarters of that.
_CHANNELS_WORTH_KEEPING = 128


def _keeps_result(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether the gradient will want the pointwise result before its activation."""
    x = tensors[0]
    return (
        torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.shape[1] >= _CHANNELS_WORTH_KEEPING
        and not torch.is_autocast_enabled("cpu")
        and any(value is not None and value.requires_grad for value in tensors)
    )


def _fake(x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, stride, padding, *activations):
    batch, _, *spatial = output_shape(x, depthwise_weight, stride, padding)
    shape = (batch, pointwise_weight.shape[0], *spatial)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=registration.common_layout(x))


def _fake_training(*arguments):
    return _fake(*arguments), _fake(*arguments)


def _fake_backward(
    grad_output, x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, stride, padding, activation,
    output_activation, output_mask, pre=None,
):  # fmt: skip
    like = (
        torch.empty_like(x, memory_format=registration.common_layout(x)),
        x.new_empty(depthwise_weight.shape),
        x.new_empty(pointwise_weight.shape),
        x.new_empty(x.shape[1]),
        x.new_empty(pointwise_weight.shape[0]),
    )
    return tuple(value if wanted else x.new_empty(0) for value, wanted in zip(like, output_mask, strict=True))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.stride, ctx.padding, ctx.activation, ctx.output_activation = inputs
    ctx.save_for_backward(*tensors)


def _setup_training_context(ctx, inputs, output):
    _, pre = output
    _setup_context(ctx, (*inputs[:5], pre, *inputs[5:]), output)
    ctx.mark_non_differentiable(pre)


def _gradient(ctx, grad_output, *_):
    if grad_output is None:
        return (None,) * 9
    wanted = list(ctx.needs_input_grad[:5])
    *tensors, pre = (*ctx.saved_tensors, None)[:6]
    arguments = (grad_output, *tensors, ctx.stride, ctx.padding, ctx.activation, ctx.output_activation, wanted)
    if torch.is_grad_enabled():
        # With create_graph the gradient must itself be differentiable, through what the forward kept too: the reference
        # is made of PyTorch's own operators.
        gradients = reference.separable_conv2d_backward(*arguments)
    else:
        gradients = registration.call(_backward, *arguments, pre)
    return *(d if needed else None for d, needed in zip(gradients, wanted, strict=True)), *(None,) * 4


_ARGUMENTS = (
    "Tensor x, Tensor depthwise_weight, Tensor pointwise_weight, Tensor? depthwise_bias, Tensor? pointwise_bias, "
    "int stride, int padding, str activation, str output_activation"
)
_forward = registration.define(
    f"separable_conv2d({_ARGUMENTS}) -> Tensor",
    reference=reference.separable_conv2d,
    fake=_fake,
    layout_of=0,
)
# The output, and the pointwise result before its activation for the gradient.
_training = registration.define(
    f"separable_conv2d_training({_ARGUMENTS}) -> (Tensor, Tensor)",
    reference=reference.separable_conv2d_training,
    fake=_fake_training,
    layout_of=0,
)
_backward = registration.define(
    f"separable_conv2d_backward(Tensor grad_output, {_ARGUMENTS}, bool[5] output_mask, Tensor? pre=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    reference=reference.separable_conv2d_backward,
    fake=_fake_backward,
    layout_of=1,
)
registration.define_composed(_training, composed_training)
registration.define_composed(_backward, composed_backward)
registration.define_gradient(_forward, setup_context=_setup_context, backward=_gradient)
registration.define_gradient(_training, setup_context=_setup_training_context, backward=_gradient)
registration.forbid_gradient(_backward, "call evkernels.ops.separable_conv2d and differentiate with create_graph=True")
for _op in (_forward, _training):
    registration.define_autocast(
        _op, lambda dtype, *arguments: tuple(v.to(dtype) if isinstance(v, Tensor) else v for v in arguments)
    )
