"""Contract of `batch_norm_activation`: documentation, checks, schema, shape rule, gradient and autocast rule."""

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops import checks, registration
from evkernels.ops.depthwise_conv2d import check_activation, check_beside


def batch_norm_activation(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    projection: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Batch norm with the statistics of its input, an activation and a projection to one map, in two passes over memory
    each way.

    Equivalent to::

        y = activation(F.batch_norm(x, None, None, weight, bias, training=True, eps=eps))
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        statistics = torch.stack([mean, variance])

    and, with a projection, `y = F.conv2d(y, projection.view(1, -1, 1, 1))`.

    Args:
        x: Input [N, C, H, W], not empty. float32, bfloat16, float16 or float64; all other tensors have its dtype and
            device.
        weight: [C].
        bias: [C].
        projection: Weights [C] of the channels in a sum over them, or None.
        activation: "none", "relu", "silu", "gelu" (exact, with erf), "gelu_tanh" or "sigmoid".
        eps: Added to the variances.

    Returns:
        y: of the shape and dtype of `x`, channels_last where `x` is; of a projection [N, 1, H, W], contiguous. Never
            aliases an input.
        statistics: Mean and biased variance [2, C], float32 (float64 for float64), without gradient.

    Raises:
        TypeError: if a tensor argument is no tensor or its dtype is not that of `x`.
        ValueError: if shapes or devices disagree, the activation is unknown or a channel has a single value.

    Computed in float32 (float64 for float64), sums in float64. Only `x` is kept for the gradient. The CPU kernel works
    in channels_last, other layouts are copied; without a kernel PyTorch's operators compute. Under autocast all tensors
    are cast to the autocast dtype. Deterministic: on the CPU the same bits for any number of threads. Differentiable to
    any order; double backward, forward mode and torch.func run on the reference. Source: Ioffe and Szegedy 2015
    (arXiv:1502.03167), algorithm 1.
    """
    checks.check_tensor("x", x)
    if x.dim() != 4 or x.numel() == 0:
        raise ValueError(f"x must be [N, C, H, W] and not empty, got {tuple(x.shape)}")
    for name, value in (("weight", weight), ("bias", bias), ("projection", projection)):
        if value is not None or name != "projection":
            check_beside(name, value, x)
            checks.check_shape(name, value, (x.shape[1],), "[C]")
    check_activation("activation", activation)
    if x.shape[0] * x.shape[2] * x.shape[3] < 2:
        raise ValueError(f"a norm must see more than one value of a channel, got {tuple(x.shape)}")
    function = reference.batch_norm_activation if registration.needs_reference() else _forward
    y, statistics = function(x, weight, bias, projection, activation, eps)
    return y, statistics.detach()


def _fake(x, weight, bias, projection, activation, eps):
    statistics = x.new_empty((2, x.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))
    if projection is not None:
        return x.new_empty((x.shape[0], 1, *x.shape[2:])), statistics
    return torch.empty_like(x, memory_format=registration.common_layout(x)), statistics


def _fake_backward(grad_output, x, weight, bias, projection, statistics, activation, eps):
    d_x = torch.empty_like(x, memory_format=registration.common_layout(x))
    return d_x, *(x.new_empty(0 if value is None else value.shape) for value in (weight, bias, projection))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation, ctx.eps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _gradient(ctx, grad_output, _):
    if grad_output is None:
        return (None,) * 6
    *tensors, statistics = ctx.saved_tensors
    backward = _backward
    if torch.is_grad_enabled():
        # With create_graph the gradient must itself be differentiable, through the statistics too.
        backward = reference.batch_norm_activation_backward
        _, statistics = reference.batch_norm_activation(*tensors, ctx.activation, ctx.eps)
    gradients = backward(grad_output, *tensors, statistics, ctx.activation, ctx.eps)
    return *(d if need else None for d, need in zip(gradients, ctx.needs_input_grad[:4], strict=True)), None, None


def _reference(x, *others):
    y, statistics = reference.batch_norm_activation(x, *others)
    return y.contiguous(memory_format=registration.common_layout(x)), statistics.contiguous()


def _reference_backward(grad_output, x, *others):
    d_x, *parameters = reference.batch_norm_activation_backward(grad_output, x, *others)
    return d_x.contiguous(memory_format=registration.common_layout(x)), *parameters


_ARGUMENTS = "Tensor x, Tensor weight, Tensor bias, Tensor? projection"
_forward = registration.define(
    f"batch_norm_activation({_ARGUMENTS}, str activation, float eps) -> (Tensor, Tensor)",
    reference=_reference,
    fake=_fake,
)
_backward = registration.define(
    f"batch_norm_activation_backward(Tensor grad_output, {_ARGUMENTS}, Tensor statistics, str activation, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=_reference_backward,
    fake=_fake_backward,
)
# Backends without a kernel run on PyTorch's own operators.
registration.define_composed(_forward, _reference)
registration.define_composed(_backward, _reference_backward)
registration.define_gradient(_forward, setup_context=_setup_context, backward=_gradient)
registration.forbid_gradient(
    _backward, "call evkernels.ops.batch_norm_activation and differentiate with create_graph=True"
)
registration.define_autocast(
    _forward, lambda dtype, *arguments: tuple(v.to(dtype) if isinstance(v, Tensor) else v for v in arguments)
)
