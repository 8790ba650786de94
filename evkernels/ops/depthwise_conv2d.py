"""Contract of `depthwise_conv2d`: documentation, checks, schema, shape rule, gradient and autocast rule."""

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops import checks, registration

ACTIVATIONS = ("none", "relu", "silu", "gelu", "gelu_tanh", "sigmoid")


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int | None = None,
    activation: str = "none",
    dilation: int = 1,
) -> Tensor:
    """One k x k filter per channel, bias and activation, fused into one pass over memory.

    Equivalent to::

        y = activation(F.conv2d(x, weight, bias, stride, padding, dilation, groups=x.shape[1]))

    Args:
        x: Input [N, C, H, W]. float32, bfloat16, float16 or float64.
        weight: Filters [C, 1, k, k], k odd, 1 to 31; dtype and device of `x`.
        bias: [C] or None; dtype and device of `x`.
        stride: 1 or 2, in both directions.
        padding: Zeros around the input, at least 0; None is (span - 1) // 2 with span = (k - 1) * dilation + 1, which
            keeps the size at stride 1.
        activation: "none", "relu", "silu", "gelu" (the exact one, with erf), "gelu_tanh" or "sigmoid".
        dilation: Distance between the filter's taps, at least 1.

    Returns:
        [N, C, (H + 2 * padding - span) // stride + 1, (W + 2 * padding - span) // stride + 1] in the dtype of `x`.
        Never aliases an input; channels_last where `x` is, contiguous otherwise.

    Raises:
        TypeError: if an argument is of a wrong type or its dtype is not among those above.
        ValueError: if shapes or devices disagree, an option is not among those above, or the filter spans more than
            the padded input.

    Computed in float32 (float64 for float64) and rounded once on output. Contiguous and channels_last inputs are read
    in place, other strides are copied first. 3 x 3 and 5 x 5 filters without dilation have loops of their own, other k
    and dilated filters share one; dilation at stride 2 has no kernel and runs on PyTorch's convolution in float32.
    Under autocast all tensors are cast to the autocast dtype. Deterministic,
    the gradients too: on the CPU they have the same bits for any number of threads. Differentiable to any order; the
    gradient keeps the inputs alone and recomputes the pre-activation, double backward, forward mode and torch.func run
    on the reference.
    """
    check_depthwise("", x, weight, bias, stride, activation)
    padding = check_padding(x, weight, padding, dilation)
    arguments = (x, weight, bias, stride, padding, activation, dilation)
    if registration.needs_reference():
        return reference.depthwise_conv2d(*arguments)
    if stride > 1 and dilation > 1:
        return _without_kernel(*arguments)
    return _forward(*arguments)


def _without_kernel(x: Tensor, *arguments) -> Tensor:
    """The reference with the op's rules for autocast and layout."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        x, *arguments = _cast(
            torch.float64 if x.dtype == torch.float64 else torch.get_autocast_dtype(device), x, *arguments
        )
    with torch.autocast(device, enabled=False):
        y = reference.depthwise_conv2d(x, *arguments)
    return y.contiguous(memory_format=registration.common_layout(x))


def check_depthwise(prefix: str, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, activation: str) -> None:
    """What every op that begins with a depthwise convolution takes; `prefix` is that of its argument names."""
    weight_name, bias_name = f"{prefix}weight", f"{prefix}bias"
    check_activation("activation", activation)
    checks.check_tensor("x", x)
    checks.check_tensor(weight_name, weight)
    if x.dim() != 4 or x.shape[1] == 0:
        raise ValueError(f"x must be [N, C, H, W] with C at least 1, got {tuple(x.shape)}")
    channels, k = x.shape[1], weight.shape[-1] if weight.dim() else 0
    checks.check_shape(weight_name, weight, (channels, 1, k, k), f"[C, 1, k, k] with C = x.shape[1] = {channels}")
    if k % 2 == 0 or not 1 <= k <= 31:
        raise ValueError(f"{weight_name} must be [C, 1, k, k] with k odd and 1 <= k <= 31, got {tuple(weight.shape)}")
    for name, value in ((weight_name, weight), (bias_name, bias)):
        if value is not None:
            check_beside(name, value, x)
    if bias is not None:
        checks.check_shape(bias_name, bias, (channels,), f"[C] with C = x.shape[1] = {channels}")
    if stride not in (1, 2):
        raise ValueError(f"stride must be 1 or 2, got {stride!r}")


def check_beside(name: str, value: Tensor, x: Tensor) -> None:
    """`value` is a tensor on the device of `x` and, except under autocast, in its dtype."""
    if not isinstance(value, Tensor) or value.dtype != x.dtype:
        cast = x.is_floating_point() and torch.is_autocast_enabled(x.device.type)
        checks.check_tensor(name, value, checks.FLOATING if cast else (x.dtype,))
    checks.check_same_device(name, value, "x", x)


def check_activation(name: str, value: str) -> None:
    if value not in ACTIVATIONS:
        raise ValueError(f"{name} must be one of {', '.join(ACTIVATIONS)}, got {value!r}")


def check_padding(x: Tensor, weight: Tensor, padding: int | None, dilation: int = 1) -> int:
    """The padding to use, at which every output pixel exists."""
    if dilation < 1:
        raise ValueError(f"dilation must be at least 1, got {dilation}")
    span = (weight.shape[-1] - 1) * dilation + 1
    padding = span // 2 if padding is None else padding
    if padding < 0:
        raise ValueError(f"padding must be at least 0, got {padding}")
    if x.shape[2] + 2 * padding < span or x.shape[3] + 2 * padding < span:
        raise ValueError(
            f"x must be at least as large as the {span} x {span} filter after padding with {padding}, "
            f"got {x.shape[2]} x {x.shape[3]} pixels"
        )
    return padding


def output_shape(x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int = 1) -> tuple[int, ...]:
    span = (weight.shape[-1] - 1) * dilation + 1
    return (*x.shape[:2], *((size + 2 * padding - span) // stride + 1 for size in x.shape[2:]))


def _fake(x, weight, bias, stride, padding, activation, dilation):
    layout = registration.common_layout(x)
    shape = output_shape(x, weight, stride, padding, dilation)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)


def _fake_backward(
    grad_output, x, weight, bias, stride, padding, activation, dilation, need_x, need_weight, need_bias
):  # fmt: skip
    layout = registration.common_layout(x)
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout) if need_x else x.new_empty(0),
        x.new_empty(weight.shape if need_weight else 0),
        x.new_empty(weight.shape[0] if need_bias else 0),
    )


def _cast(dtype, x, weight, bias, *options):
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), *options


def _setup_context(ctx, inputs, output):
    x, weight, bias, *ctx.options = inputs
    # Without an activation the bias takes no part in any gradient, but reading whether it is there does.
    ctx.save_for_backward(x, weight, bias)


def _gradient(ctx, grad_output):
    if grad_output is None:
        return (None,) * 7
    x, weight, bias = ctx.saved_tensors
    needed = [ctx.needs_input_grad[k] and value is not None for k, value in enumerate((x, weight, bias))]
    # With create_graph the gradient must itself be differentiable: the reference is made of PyTorch's own operators.
    backward = reference.depthwise_conv2d_backward if torch.is_grad_enabled() else _backward
    gradients = backward(grad_output, x, weight, bias, *ctx.options, *needed)
    return *(value if need else None for value, need in zip(gradients, needed, strict=True)), *(None,) * 4


_forward = registration.define(
    "depthwise_conv2d(Tensor x, Tensor weight, Tensor? bias, int stride, int padding, str activation, int dilation)"
    " -> Tensor",
    reference=reference.depthwise_conv2d,
    fake=_fake,
    layout_of=0,
)
_backward = registration.define(
    "depthwise_conv2d_backward(Tensor grad_output, Tensor x, Tensor weight, Tensor? bias, int stride, int padding, "
    "str activation, int dilation, bool need_x, bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    reference=reference.depthwise_conv2d_backward,
    fake=_fake_backward,
    layout_of=1,
)
registration.define_gradient(_forward, setup_context=_setup_context, backward=_gradient)
registration.forbid_gradient(_backward, "call evkernels.ops.depthwise_conv2d and differentiate with create_graph=True")
registration.define_autocast(_forward, _cast)
