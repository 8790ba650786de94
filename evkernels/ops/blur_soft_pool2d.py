"""Contract of `blur_soft_pool2d`: documentation, checks, schema, shape rule, gradient and autocast rule."""

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops import checks, registration


def blur_soft_pool2d(x: Tensor, stride: int = 2, temperature: float = 1.0) -> Tensor:
    """Binomial 3 x 3 blur and soft pooling of 2 x 2 windows, stable in float16.

    Equivalent to::

        blurred = F.conv2d(x, blur.expand(x.shape[1], 1, 3, 3), padding=1, groups=x.shape[1])
        weight = (blurred / temperature).exp()
        y = F.avg_pool2d(blurred * weight, 2, stride) / (F.avg_pool2d(weight, 2, stride) + 1e-6)

    with `blur` = [1, 2, 1] x [1, 2, 1] / 16.

    Args:
        x: [N, C, H, W] with H and W at least 2. float32, bfloat16, float16 or float64. N and C may be 0.
        stride: Of the windows, in both directions, at least 1.
        temperature: What the exponents are divided by, above 0.

    Returns:
        y: [N, C, (H - 2) // stride + 1, (W - 2) // stride + 1] in the dtype of `x`. Contiguous, never aliases `x`.

    Raises:
        TypeError: if `x` is no tensor of these dtypes or `stride` no int.
        ValueError: if `x` is not [N, C, H, W], smaller than a window, or stride or temperature are too small.

    Computed in float32 (float64 for float64), with the window's largest exponent taken out where it is above 0: as
    written above exponentials overflow in float16 from 11 on, in float32 from 88 on. Rounded once on output. Layouts
    other than contiguous are copied. Under autocast it runs in the dtype of `x`. Deterministic; on the CPU the same
    bits for any number of threads. Differentiable to any order; the gradient keeps `x` alone and blurs again. Double
    backward, forward mode and torch.func run on the reference. Source: Stergiou et al. 2021 (arXiv:2101.00440); with
    the blur, VisionCore's AABlur_SE_SoftPool.
    """
    checks.check_tensor("x", x)
    if x.dim() != 4 or min(x.shape[2:]) < 2:
        raise ValueError(f"x must be [N, C, H, W] with H and W at least 2, got {tuple(x.shape)}")
    if isinstance(stride, bool) or not isinstance(stride, int):
        raise TypeError(f"stride must be an int, got {stride!r}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    arguments = (x, stride, float(temperature))
    return (reference.blur_soft_pool2d if registration.needs_reference() else _forward)(*arguments)


def _fake(x, stride, temperature):
    return x.new_empty((*x.shape[:2], *((size - 2) // stride + 1 for size in x.shape[2:])))


def _setup_context(ctx, inputs, output):
    x, ctx.stride, ctx.temperature = inputs
    ctx.save_for_backward(x)


def _gradient(ctx, grad_output):
    if grad_output is None or not ctx.needs_input_grad[0]:
        return None, None, None
    # With create_graph the gradient must itself be differentiable: the reference is made of PyTorch's own operators.
    backward = reference.blur_soft_pool2d_backward if torch.is_grad_enabled() else _backward
    return backward(grad_output, *ctx.saved_tensors, ctx.stride, ctx.temperature), None, None


_forward = registration.define(
    "blur_soft_pool2d(Tensor x, int stride, float temperature) -> Tensor",
    reference=lambda *arguments: reference.blur_soft_pool2d(*arguments).contiguous(),
    fake=_fake,
)
_backward = registration.define(
    "blur_soft_pool2d_backward(Tensor grad_output, Tensor x, int stride, float temperature) -> Tensor",
    reference=lambda *arguments: reference.blur_soft_pool2d_backward(*arguments).contiguous(),
    fake=lambda grad_output, x, stride, temperature: x.new_empty(x.shape),
)
# Planes are small and the work is pointwise: on GPUs the reference serves, which torch.compile fuses.
for _op in (_forward, _backward):
    registration.define_composed(_op, registration.default_kernels[_op.name().partition("::")[2]])
registration.define_gradient(_forward, setup_context=_setup_context, backward=_gradient)
registration.forbid_gradient(_backward, "call evkernels.ops.blur_soft_pool2d and differentiate with create_graph=True")
registration.define_autocast(_forward, lambda dtype, *arguments: arguments)
