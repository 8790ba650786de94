"""Contract of `separable_norm_conv2d`: documentation, checks, schema, shape rule, gradient and autocast rule."""

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops import checks, registration
from evkernels.ops.depthwise_conv2d import check_activation, check_beside, check_depthwise, check_padding, output_shape


def separable_norm_conv2d(
    x: Tensor,
    depthwise_weight: Tensor,
    pointwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    pointwise_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    output_norm_weight: Tensor,
    output_norm_bias: Tensor,
    residual: Tensor | None = None,
    stride: int = 1,
    padding: int | None = None,
    activation: str = "none",
    output_activation: str = "none",
    groups: int = 0,
    output_groups: int = 0,
    eps: float = 1e-5,
    output_eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """Depthwise convolution, norm, activation, 1 x 1 convolution, norm, activation and residual, with live statistics.

    Equivalent to::

        d = F.conv2d(x, depthwise_weight, depthwise_bias, stride, padding, groups=x.shape[1])
        a = activation(F.batch_norm(d, None, None, norm_weight, norm_bias, training=True, eps=eps))
        p = F.conv2d(a, pointwise_weight, pointwise_bias)
        y = output_activation(F.batch_norm(p, None, None, output_norm_weight, output_norm_bias, True, 0, output_eps))
        y = y + residual

    with `F.group_norm(d, groups, ...)` in the place of a batch norm whose groups are not 0.

    Args:
        x: Input [N, C, H, W], nothing of it empty. float32, bfloat16, float16 or float64; all other tensors have its
            dtype and device.
        depthwise_weight: One filter per channel [C, 1, k, k], k odd and at most 31.
        pointwise_weight: [O, C, 1, 1].
        depthwise_bias: [C] or None.
        pointwise_bias: [O] or None.
        norm_weight, norm_bias: [C], of the norm behind the depthwise convolution.
        output_norm_weight, output_norm_bias: [O], of the norm behind the pointwise convolution.
        residual: What is added at the end, [N, O, H', W'], or None.
        stride: 1 or 2, in both directions.
        padding: Rows and columns of zeros added at each border; None is k // 2.
        activation, output_activation: "none", "relu", "silu", "gelu" (exact, with erf), "gelu_tanh" or "sigmoid".
        groups, output_groups: 0 is batch norm; else the groups of a group norm, which divide C or O.
        eps, output_eps: Added to the variances.

    Returns:
        y: [N, O, H', W'] as of `separable_conv2d`.
        statistics: Mean and biased variance of the depthwise result, [2, 1, C], or [2, N, groups] of a group norm.
        output_statistics: Those of the pointwise result, [2, 1, O] or [2, N, output_groups]. Both are float32 (float64
            for float64) and have no gradient.

    Raises:
        TypeError: if a tensor argument is no tensor or its dtype is not that of `x`.
        ValueError: if shapes or devices disagree, an option is not among those above, groups do not divide the
            channels, or a norm sees a single value.

    Computed in float32 (float64 for float64), sums in float64. On the CPU the first norm is folded into the filters, as
    in evaluation mode: where a channel's mean is thousands of its deviations, that rounds up to three times as much as
    a norm of its own; the gradient of a bias before a batch norm, of which sums leave rounding, is exactly zero. Kept
    for the gradient are `x` and the pointwise result; the depthwise result is formed anew in every pass over it. The
    CPU kernel works in channels_last, other layouts are copied; without a kernel PyTorch's operators compute. Under
    autocast all tensors are cast to the autocast dtype. Deterministic: on the CPU the same bits for any number of
    threads. Differentiable to any order; double backward, forward mode and torch.func run on the reference. Source:
    Ioffe and Szegedy 2015 (arXiv:1502.03167), algorithm 1; Wu and He 2018 (arXiv:1803.08494); Howard et al. 2017
    (arXiv:1704.04861), figure 3.
    """
    check_depthwise("depthwise_", x, depthwise_weight, depthwise_bias, stride, activation)
    check_activation("output_activation", output_activation)
    channels = x.shape[1]
    check_beside("pointwise_weight", pointwise_weight, x)
    outputs = pointwise_weight.shape[0] if pointwise_weight.dim() else 0
    if outputs == 0:
        raise ValueError(f"pointwise_weight must be [O, C, 1, 1] with O >= 1, got {tuple(pointwise_weight.shape)}")
    checks.check_shape(
        "pointwise_weight",
        pointwise_weight,
        (outputs, channels, 1, 1),
        f"[O, C, 1, 1] with C = x.shape[1] = {channels}",
    )
    for name, value, size in (
        ("norm_weight", norm_weight, channels),
        ("norm_bias", norm_bias, channels),
        ("pointwise_bias", pointwise_bias, outputs),
        ("output_norm_weight", output_norm_weight, outputs),
        ("output_norm_bias", output_norm_bias, outputs),
    ):
        if value is not None or name != "pointwise_bias":
            check_beside(name, value, x)
            checks.check_shape(name, value, (size,), "[C]" if name.startswith("norm") else "[O]")
    if x.shape[0] == 0:
        raise ValueError(f"x must not be empty, got {tuple(x.shape)}")
    padding = check_padding(x, depthwise_weight, padding)
    shape = _output_shape(x, depthwise_weight, pointwise_weight, stride, padding)
    if residual is not None:
        check_beside("residual", residual, x)
        checks.check_shape("residual", residual, shape, "[N, O, H', W']")
    for name, count, size in (("groups", groups, channels), ("output_groups", output_groups, outputs)):
        if count < 0 or (count and size % count):
            raise ValueError(f"{name} must be 0 or divide the {size} channels, got {count}")
        values = shape[2] * shape[3] * (size // count if count else shape[0])
        if values < 2:
            raise ValueError(f"a norm must see more than one value, got {name} = {count} and an output of {shape}")
    tensors = (x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias)
    tensors += (norm_weight, norm_bias, output_norm_weight, output_norm_bias, residual)
    options = (stride, padding, activation, output_activation, groups, output_groups, eps, output_eps)
    function = reference.separable_norm_conv2d_kernel if registration.needs_reference() else _forward
    y, _, statistics, output_statistics = function(*tensors, *options)
    return y, statistics.detach(), output_statistics.detach()


def _output_shape(x, depthwise_weight, pointwise_weight, stride, padding) -> tuple[int, ...]:
    batch, _, *spatial = output_shape(x, depthwise_weight, stride, padding)
    return (batch, pointwise_weight.shape[0], *spatial)


def _fake(
    x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, norm_weight, norm_bias, output_norm_weight,
    output_norm_bias, residual, stride, padding, activation, output_activation, groups, output_groups, *eps,
):  # fmt: skip
    shape = _output_shape(x, depthwise_weight, pointwise_weight, stride, padding)
    wide = torch.promote_types(x.dtype, torch.float32)

    def statistics(count, channels):
        return x.new_empty((2, shape[0] if count else 1, count or channels), dtype=wide)

    return (
        torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=registration.common_layout(x)),
        torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last),
        statistics(groups, x.shape[1]),
        statistics(output_groups, shape[1]),
    )


def _fake_backward(grad_output, x, *rest):
    *parameters, need_x = *rest[:8], rest[-1]
    return (
        torch.empty_like(x, memory_format=registration.common_layout(x)) if need_x else x.new_empty(0),
        *(x.new_empty(0 if value is None else value.shape) for value in parameters),
    )


def _reference(*arguments):
    """The reference with the layouts of the kernels."""
    y, pre, *statistics = reference.separable_norm_conv2d_kernel(*arguments)
    layout = registration.common_layout(arguments[0])
    return y.contiguous(memory_format=layout), pre.contiguous(memory_format=torch.channels_last), *statistics


def _reference_backward(*arguments):
    d_x, *others = reference.separable_norm_conv2d_backward(*arguments)
    x, need_x = arguments[1], arguments[-1]
    d_x = d_x.contiguous(memory_format=registration.common_layout(x)) if need_x else d_x
    return d_x, *(value.contiguous() for value in others)


def _setup_context(ctx, inputs, output):
    *tensors, residual = inputs[:10]
    ctx.options = inputs[10:]
    ctx.has_residual = residual is not None
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _gradient(ctx, grad_output, *_):
    if grad_output is None:
        return (None,) * 18
    tensors, options, need_x = ctx.saved_tensors, ctx.options, ctx.needs_input_grad[0]
    if torch.is_grad_enabled():
        # With create_graph the gradient must itself be differentiable, through what the forward kept too.
        _, pre, statistics, output_statistics = reference.separable_norm_conv2d_kernel(*tensors[:9], None, *options)
        gradients = reference.separable_norm_conv2d_backward(
            grad_output, *tensors[:9], pre, statistics, output_statistics, *options, need_x
        )
    else:
        gradients = _backward(grad_output, *tensors, *options, need_x)
    wanted = [d if ctx.needs_input_grad[k] else None for k, d in enumerate(gradients)]
    return *wanted, grad_output if ctx.has_residual else None, *(None,) * 8


_PARAMETERS = (
    "Tensor x, Tensor depthwise_weight, Tensor pointwise_weight, Tensor? depthwise_bias, Tensor? pointwise_bias, "
    "Tensor norm_weight, Tensor norm_bias, Tensor output_norm_weight, Tensor output_norm_bias"
)
_OPTIONS = (
    "int stride, int padding, str activation, str output_activation, int groups, int output_groups, float eps, "
    "float output_eps"
)
_forward = registration.define(
    f"separable_norm_conv2d({_PARAMETERS}, Tensor? residual, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
)
_backward = registration.define(
    f"separable_norm_conv2d_backward(Tensor grad_output, {_PARAMETERS}, Tensor pre, Tensor statistics, "
    f"Tensor output_statistics, {_OPTIONS}, bool need_x) -> ({', '.join(['Tensor'] * 9)})",
    reference=_reference_backward,
    fake=_fake_backward,
)
# Backends without a kernel run on PyTorch's own operators.
registration.define_composed(_forward, _reference)
registration.define_composed(_backward, _reference_backward)
registration.define_gradient(_forward, setup_context=_setup_context, backward=_gradient)
registration.forbid_gradient(
    _backward, "call evkernels.ops.separable_norm_conv2d and differentiate with create_graph=True"
)
registration.define_autocast(
    _forward,
    lambda dtype, *arguments: tuple(v.to(dtype) if isinstance(v, Tensor) else v for v in arguments),
)
