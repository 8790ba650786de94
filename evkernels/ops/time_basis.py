"""Contract of `time_basis`: documentation, checks, schema, shape rule, gradient and autocast rule."""

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops import checks, registration

KINDS = ("cosine", "gaussian", "mexican_hat", "morlet", "stepped_cubic")


def time_basis(t: Tensor, gate: Tensor, rate: Tensor, shift: Tensor, weight: Tensor, kind: str) -> Tensor:
    """Sums of basis functions of time, computed only where a gate is open: an expert of K-MOTE.

    Equivalent to::

        z = t[:, None, None] * rate + shift
        u = z.clamp(0, 1)
        basis = {
            "cosine": z.cos(),
            "gaussian": torch.exp(-(z**2) / 2),
            "mexican_hat": (1 - z**2) * torch.exp(-(z**2) / 2),
            "morlet": (5 * z).cos() * torch.exp(-(z**2) / 2),
            "stepped_cubic": ((u * (J - 1)).ceil() == torch.arange(J)) * (1 - u) ** 3 / 6,
        }
        embedding = gate[:, None] * (basis[kind] * weight).sum(-1)

    Args:
        t: Timestamps [N], in whatever unit the parameters are learned for. float32, bfloat16, float16 or float64; all
            other tensors have its dtype and device.
        gate: Factors of the timestamps [N]. Where it is 0 the row is 0, nothing is computed, and no gradient flows, not
            to the gate either: a router's choice is no function of the values that it did not ask for.
        rate: Arguments per unit of time, of each of D features and J functions [D, J]. D and J may be 0.
        shift: Arguments at time 0, [D, J].
        weight: Weights of the functions [D, J].
        kind: "cosine", "gaussian", "mexican_hat", "morlet" or "stepped_cubic": K-MOTE's spline, J segments of which a
            cubic takes its factor, the first of them all that is not above 0.

    Returns:
        embedding: [N, D], in the dtype of `t`. Contiguous, never aliases the inputs.

    Raises:
        TypeError: if an argument is no tensor or its dtype is not that of `t`.
        ValueError: if shapes or devices disagree or `kind` is not among those above.

    Computed in float32 (float64 for float64) and rounded once on output; cosines are accurate for arguments of any
    size. NaN propagates where the gate is not 0. Inputs of any strides; all are copied to be contiguous. Under autocast
    everything is cast to float32, because timestamps do not survive 16 bits. Deterministic; on the CPU the embedding
    and the gradients have the same bits for any number of threads. Differentiable to any order in all tensors; the
    gradient keeps the arguments alone and recomputes. Double backward, forward mode and torch.func run on the
    reference. Source: the experts of K_MOTE of kan-mammote, each an affine map and such sums.
    """
    _check(t, gate, rate, shift, weight, kind)
    if registration.needs_reference():
        return reference.time_basis(t, gate, rate, shift, weight, kind)
    return _forward(t, gate, rate, shift, weight, kind)


def _check(t, gate, rate, shift, weight, kind):
    checks.check_tensor("t", t)
    if t.dim() != 1:
        raise ValueError(f"t must be [N], got {tuple(t.shape)}")
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    cast = torch.is_autocast_enabled(t.device.type)
    for name, value in {"gate": gate, "rate": rate, "shift": shift, "weight": weight}.items():
        checks.check_tensor(name, value, checks.FLOATING if cast else (t.dtype,))
        checks.check_same_device(name, value, "t", t)
    checks.check_shape("gate", gate, t.shape, "[N]")
    if rate.dim() != 2:
        raise ValueError(f"rate must be [D, J], got {tuple(rate.shape)}")
    checks.check_shape("shift", shift, rate.shape, "[D, J]")
    checks.check_shape("weight", weight, rate.shape, "[D, J]")


def _fake(t, gate, rate, shift, weight, kind):
    return t.new_empty(t.shape[0], rate.shape[0])


def _fake_backward(grad_embedding, *arguments):
    return tuple(value.new_empty(value.shape) for value in arguments[:-1])


def _setup_context(ctx, inputs, output):
    *tensors, ctx.kind = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx, grad_embedding):
    if grad_embedding is None:
        return (None,) * 6
    # With create_graph the gradient must itself be differentiable: the reference is made of PyTorch's own operators.
    backward = reference.time_basis_backward if torch.is_grad_enabled() else _backward
    gradients = backward(grad_embedding, *ctx.saved_tensors, ctx.kind)
    return *(d if need else None for d, need in zip(gradients, ctx.needs_input_grad[:5], strict=True)), None


_ARGUMENTS = "Tensor t, Tensor gate, Tensor rate, Tensor shift, Tensor weight, str kind"
_forward = registration.define(
    f"time_basis({_ARGUMENTS}) -> Tensor", reference=reference.time_basis, fake=_fake, layout_of=0
)
_backward = registration.define(
    f"time_basis_backward(Tensor grad_embedding, {_ARGUMENTS}) -> ({', '.join(['Tensor'] * 5)})",
    reference=reference.time_basis_backward,
    fake=_fake_backward,
    layout_of=1,
)
# Without Triton PyTorch's own operators serve GPUs.
for _op in (_forward, _backward):
    registration.define_composed(_op, registration.default_kernels[_op._opname])
registration.define_gradient(_forward, setup_context=_setup_context, backward=_gradient)
registration.forbid_gradient(_backward, "call evkernels.ops.time_basis and differentiate with create_graph=True")
registration.define_autocast(
    _forward, lambda dtype, *arguments: tuple(v.float() if isinstance(v, Tensor) else v for v in arguments)
)
