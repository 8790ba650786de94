"""Contract of `lstm_gates`: documentation, checks, schema, shape rule, gradient and autocast rule."""

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops import checks, registration


def lstm_gates(gates: Tensor, c: Tensor, order: str = "ifgo") -> tuple[Tensor, Tensor]:
    """ConvLSTM gate activations and state update, fused into one pass over memory.

    Equivalent to::

        i, f, g, o = gates.chunk(4, dim=1)
        c_next = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c_next.tanh()

    Args:
        gates: Pre-activations [N, 4*C, ...], four blocks of C channels in the order named by `order`. float32,
            bfloat16, float16 or float64.
        c: Previous cell state [N, C, ...] on the same device, in the dtype of `gates`, or float32 beside 16-bit gates.
        order: Which block is which: a permutation of "ifgo" (input, forget, cell candidate, output). "ifgo" is
            torch.nn.LSTM, "fiog" RVT, "ifog" E2VID.

    Returns:
        h, c_next: [N, C, ...] each, h in the dtype of `gates`, c_next in the dtype of `c`. Never alias the inputs.
        Both are channels_last where `gates` is, contiguous otherwise.

    Raises:
        TypeError: if an argument is no tensor or its dtype is not among those above.
        ValueError: if shapes or devices disagree or `order` is no permutation of "ifgo".

    Computed in float32 (float64 for float64) and rounded once on output; NaN propagates, +-Inf saturates the gates.
    Contiguous and, for 4 dimensions, channels_last inputs are read in place, other strides are copied first. Under
    autocast `gates` is cast to the autocast dtype and `c` to float32. Deterministic. Differentiable to any order; the
    gradient keeps only `gates` and `c` and recomputes the activations, double backward, forward mode and torch.func
    run on the reference. Source: Shi et al. 2015 (arXiv:1506.04214), eq. 3 without peepholes.
    """
    checks.check_permutation("order", order, "ifgo")
    checks.check_tensor("gates", gates)
    checks.check_tensor("c", c)
    checks.check_same_device("c", c, "gates", gates)
    if c.dim() < 2:
        raise ValueError(f"c must be [N, C, ...] with at least 2 dimensions, got {tuple(c.shape)}")
    batch, channels, *rest = c.shape
    checks.check_shape("gates", gates, (batch, 4 * channels, *rest), "[N, 4*C, ...] with C = c.shape[1]")
    if c.dtype != gates.dtype and not torch.is_autocast_enabled(gates.device.type):
        checks.check_state_dtype("c", c, "gates", gates)
    if registration.needs_reference():
        return reference.lstm_gates(gates, c, order)
    return registration.call(_forward, gates, c, order)


def _fake(gates, c, order):
    layout = registration.common_layout(gates)
    return (
        torch.empty(c.shape, dtype=gates.dtype, device=c.device, memory_format=layout),
        torch.empty(c.shape, dtype=c.dtype, device=c.device, memory_format=layout),
    )


def _fake_backward(grad_h, grad_c_next, gates, c, order):
    layout = registration.common_layout(gates)
    return (
        torch.empty(gates.shape, dtype=gates.dtype, device=c.device, memory_format=layout),
        torch.empty(c.shape, dtype=c.dtype, device=c.device, memory_format=layout),
    )


def _setup_context(ctx, inputs, output):
    gates, c, ctx.order = inputs
    ctx.save_for_backward(gates, c)


def _gradient(ctx, grad_h, grad_c_next):
    gates, c = ctx.saved_tensors
    # With create_graph the gradient must itself be differentiable: the reference is made of PyTorch's own operators.
    backward = reference.lstm_gates_backward if torch.is_grad_enabled() else _backward
    return *backward(grad_h, grad_c_next, gates, c, ctx.order), None


_forward = registration.define(
    "lstm_gates(Tensor gates, Tensor c, str order) -> (Tensor, Tensor)",
    reference=reference.lstm_gates,
    fake=_fake,
    layout_of=0,
)
_backward = registration.define(
    "lstm_gates_backward(Tensor? grad_h, Tensor? grad_c_next, Tensor gates, Tensor c, str order) -> (Tensor, Tensor)",
    reference=reference.lstm_gates_backward,
    fake=_fake_backward,
    layout_of=2,
)
registration.define_gradient(_forward, setup_context=_setup_context, backward=_gradient)
registration.forbid_gradient(_backward, "call evkernels.ops.lstm_gates and differentiate with create_graph=True")
registration.define_autocast(_forward, lambda dtype, gates, c, order: (gates.to(dtype), c.float(), order))
