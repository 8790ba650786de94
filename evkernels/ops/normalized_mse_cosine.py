"""Contract of `normalized_mse_cosine`: documentation, argument checks, schema, shape rule, gradient, autocast rule."""

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops import checks, registration


def normalized_mse_cosine(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared difference and mean cosine of normalised rows, in one pass over memory.

    Equivalent to::

        p, q = F.normalize(a, dim=1), F.normalize(b, dim=1)
        mse, cosine = F.mse_loss(p, q), F.cosine_similarity(a, b).mean()

    Args:
        a: Features [N, D], both sizes at least 1. float32, bfloat16, float16 or float64.
        b: Features [N, D] to compare with, row by row, dtype and device of `a`.

    Returns:
        mse, cosine: [] each in the dtype of `a`: the mean over all N * D elements of (p - q)^2, which is
        2 (1 - cosine) / D, and the mean over rows of p . q, -1 to 1.

    Raises:
        TypeError: if an argument is no tensor or its dtype is not among those above.
        ValueError: if shapes or devices disagree or a size is 0.

    Computed in float32 (float64 for float64) and rounded once on output; the differences are summed themselves, so that
    mse keeps its relative accuracy where rows are nearly alike. A row shorter than 1e-12 is divided by that, as in
    F.normalize; NaN propagates. Under autocast both are cast to float32. Deterministic. Differentiable to any order;
    the gradient keeps only the inputs, double backward, forward mode and torch.func run on the reference.
    """
    checks.check_tensor("a", a)
    checks.check_tensor("b", b, (a.dtype,))
    checks.check_same_device("b", b, "a", a)
    if a.dim() != 2 or a.shape[0] == 0 or a.shape[1] == 0:
        raise ValueError(f"a must be [N, D] with sizes of at least 1, got {tuple(a.shape)}")
    checks.check_shape("b", b, a.shape, "[N, D] as a")
    function = reference.normalized_mse_cosine if registration.needs_reference() else _forward
    return function(a, b)


def _fake(a, b):
    return a.new_empty(()), a.new_empty(())


def _fake_backward(grad_mse, grad_cosine, a, b):
    return a.new_empty(a.shape), b.new_empty(b.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradient(ctx, grad_mse, grad_cosine):
    # With create_graph the gradient must itself be differentiable: the reference is made of PyTorch's own operators.
    backward = reference.normalized_mse_cosine_backward if torch.is_grad_enabled() else _backward
    return backward(grad_mse, grad_cosine, *ctx.saved_tensors)


_forward = registration.define(
    "normalized_mse_cosine(Tensor a, Tensor b) -> (Tensor, Tensor)",
    reference=reference.normalized_mse_cosine,
    fake=_fake,
)
_backward = registration.define(
    "normalized_mse_cosine_backward(Tensor? grad_mse, Tensor? grad_cosine, Tensor a, Tensor b) -> (Tensor, Tensor)",
    reference=reference.normalized_mse_cosine_backward,
    fake=_fake_backward,
)
# Backends without a kernel run on PyTorch's own operators.
registration.define_composed(_forward, reference.normalized_mse_cosine)
registration.define_composed(_backward, reference.normalized_mse_cosine_backward)
registration.define_gradient(_forward, setup_context=_setup_context, backward=_gradient)
registration.forbid_gradient(
    _backward, "call evkernels.ops.normalized_mse_cosine and differentiate with create_graph=True"
)
registration.define_autocast(_forward, lambda dtype, a, b: (a.float(), b.float()))
