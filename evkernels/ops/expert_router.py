"""Contract of `expert_router`: documentation, checks, schema, shape rule, gradient and autocast rule."""

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops import checks, registration


def expert_router(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    top: int,
) -> tuple[Tensor, Tensor]:
    """Router of a mixture of experts: a network with two hidden layers, softmax, the largest weights.

    Equivalent to::

        hidden = F.linear(F.linear(x, weight1, bias1).relu(), weight2, bias2).relu()
        weights = F.linear(hidden, weight3, bias3).softmax(dim=1).T
        largest, chosen = weights.topk(top, dim=0)
        gates = torch.zeros_like(weights).scatter(0, chosen, largest)

    but that of equal weights the first are chosen.

    Args:
        x: What the router sees of each of N timestamps [N, I]: the time, and features. float32, bfloat16, float16 or
            float64; all other tensors have its dtype and device. N may be 0, no other size.
        weight1: [H, I].
        bias1: [H].
        weight2: [K, H].
        bias2: [K].
        weight3: [E, K], for E experts.
        bias3: [E].
        top: How many experts are chosen, 1 to E.

    Returns:
        weights, gates: [E, N] each, in the dtype of `x`. Contiguous, never alias the inputs.

    Raises:
        TypeError: if an argument is no tensor or its dtype is not that of `x`.
        ValueError: if shapes or devices disagree, a layer is empty or `top` is out of range.

    Computed in float32 (float64 for float64) and rounded once on output. A timestamp with NaN has NaN for all weights
    and gates. Inputs of any strides; all are copied to be contiguous. Under autocast everything is cast to float32,
    because timestamps do not survive 16 bits. Deterministic; on the CPU the results and the gradients have the same
    bits for any number of threads. Differentiable to any order in all tensors, through the weights of chosen experts
    (the choice is constant); the gradient keeps the arguments alone and recomputes. Double backward, forward mode and
    torch.func run on the reference. Source: the routers of K_MOTE of kan-mammote.
    """
    _check(x, weight1, bias1, weight2, bias2, weight3, bias3, top)
    if registration.needs_reference():
        return reference.expert_router(x, weight1, bias1, weight2, bias2, weight3, bias3, top)
    return _forward(x, weight1, bias1, weight2, bias2, weight3, bias3, top)


def _check(x, weight1, bias1, weight2, bias2, weight3, bias3, top):
    checks.check_tensor("x", x)
    if x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"x must be [N, I] with I at least 1, got {tuple(x.shape)}")
    cast = torch.is_autocast_enabled(x.device.type)
    inputs = x.shape[1]
    for number, (weight, bias) in enumerate(((weight1, bias1), (weight2, bias2), (weight3, bias3)), 1):
        for name, value in ((f"weight{number}", weight), (f"bias{number}", bias)):
            checks.check_tensor(name, value, checks.FLOATING if cast else (x.dtype,))
            checks.check_same_device(name, value, "x", x)
        if weight.dim() != 2 or weight.shape[0] < 1 or weight.shape[1] != inputs:
            raise ValueError(f"weight{number} must be [outputs, {inputs}], got {tuple(weight.shape)}")
        checks.check_shape(f"bias{number}", bias, weight.shape[:1], "[outputs]")
        inputs = weight.shape[0]
    if not 1 <= top <= inputs:
        raise ValueError(f"top must be in [1, {inputs}], got {top}")


def _fake(x, weight1, bias1, weight2, bias2, weight3, bias3, top):
    shape = (weight3.shape[0], x.shape[0])
    return x.new_empty(shape), x.new_empty(shape)


def _fake_backward(grad_weights, grad_gates, *arguments):
    return tuple(value.new_empty(value.shape) for value in arguments[:-1])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.top = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, grad_weights, grad_gates):
    if grad_weights is None and grad_gates is None:
        return (None,) * 8
    # With create_graph the gradient must itself be differentiable: the reference is made of PyTorch's own operators.
    backward = reference.expert_router_backward if torch.is_grad_enabled() else _backward
    gradients = backward(grad_weights, grad_gates, *ctx.saved_tensors, ctx.top)
    return *(d if need else None for d, need in zip(gradients, ctx.needs_input_grad[:7], strict=True)), None


_ARGUMENTS = (
    "Tensor x, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, Tensor weight3, Tensor bias3, int top"
)
_forward = registration.define(
    f"expert_router({_ARGUMENTS}) -> (Tensor, Tensor)", reference=reference.expert_router, fake=_fake, layout_of=0
)
_backward = registration.define(
    f"expert_router_backward(Tensor? grad_weights, Tensor? grad_gates, {_ARGUMENTS}) -> ({', '.join(['Tensor'] * 7)})",
    reference=reference.expert_router_backward,
    fake=_fake_backward,
    layout_of=2,
)
# Small products, which a library does well, and pointwise work, which torch.compile fuses: PyTorch's own operators
# serve GPUs.
for _op in (_forward, _backward):
    registration.define_composed(_op, registration.default_kernels[_op._opname])
registration.define_gradient(_forward, setup_context=_setup_context, backward=_gradient)
registration.forbid_gradient(_backward, "call evkernels.ops.expert_router and differentiate with create_graph=True")
registration.define_autocast(
    _forward, lambda dtype, *arguments: tuple(v.float() if isinstance(v, Tensor) else v for v in arguments)
)
