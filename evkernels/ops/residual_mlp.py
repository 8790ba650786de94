"""Contract of `residual_mlp`: documentation, checks, schema, shape rule, gradient and autocast rule."""

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops import checks, registration


def residual_mlp(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    scale: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """The second half of a transformer's block: layer norm, MLP with GELU, scale per channel, added to the input.

    Equivalent to::

        hidden = F.gelu(F.linear(F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps), weight1, bias1))
        y = x + scale * F.linear(hidden, weight2, bias2)

    Args:
        x: [..., C]. float32, bfloat16, float16 or float64; all other tensors have its dtype and device. Sizes before
            the last may be 0.
        norm_weight: [C].
        norm_bias: [C].
        weight1: [H, C].
        bias1: [H].
        weight2: [C, H].
        bias2: [C].
        scale: [C].
        eps: Added to the variance.

    Returns:
        y: of the shape and dtype of `x`. Contiguous, never aliases the inputs.

    Raises:
        TypeError: if a tensor argument is no tensor or its dtype is not that of `x`.
        ValueError: if shapes or devices disagree or a layer is empty.

    Computed in float32 (float64 for float64) and rounded once on output. Inputs of any strides; all are copied to be
    contiguous. Under autocast everything is cast to float32, because the sum with `x` does not survive 16 bits.
    Deterministic; on the CPU the results have the same bits for any number of threads. Differentiable to any order; the
    gradient is PyTorch's operators on every device and forms the hidden layer again. Double backward, forward mode and
    torch.func run on the reference. PyTorch's own layers are the faster choice in training, from 256 channels on, and
    in 16 bits where the processor multiplies matrices of bfloat16. Source: Vaswani et al. 2017 (arXiv:1706.03762); the
    scale is LayerScale of Touvron et al. 2021 (arXiv:2103.17239).
    """
    arguments = (x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, scale, eps)
    _check(*arguments)
    return (reference.residual_mlp if registration.needs_reference() else _forward)(*arguments)


def _check(x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, scale, eps):
    checks.check_tensor("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., C] with C at least 1, got {tuple(x.shape)}")
    checks.check_tensor("weight1", weight1)
    if weight1.dim() != 2 or weight1.shape[0] == 0:
        raise ValueError(f"weight1 must be [H, C] with H at least 1, got {tuple(weight1.shape)}")
    channels, hidden = x.shape[-1], weight1.shape[0]
    cast = torch.is_autocast_enabled(x.device.type)
    for name, value, shape, meaning in (
        ("norm_weight", norm_weight, (channels,), "[C]"),
        ("norm_bias", norm_bias, (channels,), "[C]"),
        ("weight1", weight1, (hidden, channels), "[H, C]"),
        ("bias1", bias1, (hidden,), "[H]"),
        ("weight2", weight2, (channels, hidden), "[C, H]"),
        ("bias2", bias2, (channels,), "[C]"),
        ("scale", scale, (channels,), "[C]"),
    ):
        checks.check_tensor(name, value, checks.FLOATING if cast else (x.dtype,))
        checks.check_same_device(name, value, "x", x)
        checks.check_shape(name, value, shape, meaning)


def _fake(x, *others):
    return x.new_empty(x.shape)


def _fake_backward(grad_output, *arguments):
    return tuple(value.new_empty(value.shape) for value in arguments[:-1])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, grad_output):
    if grad_output is None:
        return (None,) * 9
    # With create_graph the gradient must itself be differentiable: the reference is made of PyTorch's own operators.
    backward = reference.residual_mlp_backward if torch.is_grad_enabled() else _backward
    gradients = backward(grad_output, *ctx.saved_tensors, ctx.eps)
    return *(d if need else None for d, need in zip(gradients, ctx.needs_input_grad[:8], strict=True)), None


_ARGUMENTS = (
    "Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, "
    "Tensor scale, float eps"
)
_forward = registration.define(
    f"residual_mlp({_ARGUMENTS}) -> Tensor",
    reference=lambda *arguments: reference.residual_mlp(*arguments).contiguous(),
    fake=_fake,
)
_backward = registration.define(
    f"residual_mlp_backward(Tensor grad_output, {_ARGUMENTS}) -> ({', '.join(['Tensor'] * 8)})",
    reference=lambda *arguments: tuple(value.contiguous() for value in reference.residual_mlp_backward(*arguments)),
    fake=_fake_backward,
)
# GPUs have products and pointwise work that torch.compile fuses; the gradient is most of all products.
registration.define_composed(_forward, registration.default_kernels["residual_mlp"])
registration.define_composed(_backward, registration.default_kernels["residual_mlp_backward"], ("CPU", "CUDA"))
registration.define_gradient(_forward, setup_context=_setup_context, backward=_gradient)
registration.forbid_gradient(_backward, "call evkernels.ops.residual_mlp and differentiate with create_graph=True")
registration.define_autocast(
    _forward, lambda dtype, *arguments: tuple(v.float() if isinstance(v, Tensor) else v for v in arguments)
)
