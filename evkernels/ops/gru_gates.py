"""Contracts of `gru_gates`, `gru_reset` and `gru_update`: documentation, checks, schemas, gradients, autocast rules.

One file because they are the pointwise halves of one cell: `gru_gates` alone of the form whose reset gate acts after
the convolution, `gru_reset` and `gru_update` of the classic form, which convolves r*h between them.
"""

import torch
from torch import Tensor

from evkernels import reference
from evkernels.ops import checks, registration


def gru_gates(x_gates: Tensor, h_gates: Tensor, h: Tensor, order: str = "zrn") -> Tensor:
    """ConvGRU gate activations and state update with the reset gate after the convolution, in one pass over memory.

    Equivalent to::

        z, r, n = (x_gates + h_gates).chunk(3, dim=1)
        z, r = z.sigmoid(), r.sigmoid()
        h_next = (1 - z) * h + z * (n + r * h).tanh()

    The reset gate multiplies h itself. In torch.nn.GRU it multiplies the recurrent part of n, and z is exchanged for
    1 - z.

    Args:
        x_gates: Pre-activations from the input [N, 3*C, ...], three blocks of C channels in the order named by
            `order`. float32, bfloat16, float16 or float64.
        h_gates: Pre-activations from the state [N, 3*C, ...], dtype, device and order of `x_gates`.
        h: Previous state [N, C, ...] on the same device, in the dtype of `x_gates`, or float32 beside 16-bit gates.
        order: Which block is which: a permutation of "zrn" (update, reset, candidate).

    Returns:
        h_next: [N, C, ...] in the dtype of `h`. Never aliases the inputs. channels_last where `x_gates` is,
        contiguous otherwise.

    Raises:
        TypeError: if an argument is no tensor or its dtype is not among those above.
        ValueError: if shapes or devices disagree or `order` is no permutation of "zrn".

    Computed in float32 (float64 for float64) and rounded once on output; NaN propagates, +-Inf saturates the gates.
    Contiguous and, for 4 dimensions, channels_last inputs are read in place, other strides are copied first. Under
    autocast the gates are cast to the autocast dtype and `h` to float32. Deterministic. Differentiable to any order;
    the gradient keeps only the inputs and recomputes the activations, the gradients of `x_gates` and `h_gates` are one
    tensor, double backward, forward mode and torch.func run on the reference. Source: Cho et al. 2014
    (arXiv:1406.1078), eq. 5-8, with the reset gate on h after the convolution, as in VisionCore's fast ConvGRU.
    """
    checks.check_permutation("order", order, "zrn")
    _check_state(h)
    _check_gates("x_gates", x_gates, 3, h)
    _check_gates("h_gates", h_gates, 3, h)
    _check_dtypes("h_gates", h_gates, "x_gates", x_gates, h)
    if registration.needs_reference():
        return reference.gru_gates(x_gates, h_gates, h, order)
    return registration.call(_gates, x_gates, h_gates, h, order)


def gru_reset(zr: Tensor, h: Tensor, order: str = "zr") -> tuple[Tensor, Tensor]:
    """First half of the classic ConvGRU update: both gates, and the reset state that the candidate convolves.

    Equivalent to::

        z, r = zr.sigmoid().chunk(2, dim=1)
        rh = r * h

    Args:
        zr: Pre-activations [N, 2*C, ...], two blocks of C channels in the order named by `order`. float32, bfloat16,
            float16 or float64.
        h: Previous state [N, C, ...] on the same device, in the dtype of `zr`, or float32 beside 16-bit gates.
        order: Which block is which: "zr" or "rz" (update, reset).

    Returns:
        z, rh: [N, C, ...] each, in the dtype of `zr`: the activated update gate for `gru_update`, and r*h. Never alias
        the inputs. Both are channels_last where `zr` is, contiguous otherwise.

    Raises:
        TypeError: if an argument is no tensor or its dtype is not among those above.
        ValueError: if shapes or devices disagree or `order` is no permutation of "zr".

    Computed in float32 (float64 for float64) and rounded once on output; NaN propagates, +-Inf saturates the gates.
    Contiguous and, for 4 dimensions, channels_last inputs are read in place, other strides are copied first. Under
    autocast `zr` is cast to the autocast dtype and `h` to float32. Deterministic. Differentiable to any order; the
    gradient keeps only `zr` and `h` and recomputes the activations, double backward, forward mode and torch.func run
    on the reference. Source: Cho et al. 2014 (arXiv:1406.1078), eq. 5-6; Ballas et al. 2016 (arXiv:1511.06432).
    """
    checks.check_permutation("order", order, "zr")
    _check_state(h)
    _check_gates("zr", zr, 2, h)
    _check_dtypes(None, None, "zr", zr, h)
    if registration.needs_reference():
        return reference.gru_reset(zr, h, order)
    return registration.call(_reset, zr, h, order)


def gru_update(z: Tensor, n: Tensor, h: Tensor) -> Tensor:
    """Second half of the classic ConvGRU update: candidate activation and blend.

    Equivalent to::

        h_next = (1 - z) * h + z * n.tanh()

    This is the blend of the event-camera models (E2VID, FireNet, VisionCore); torch.nn.GRU exchanges z and 1 - z.

    Args:
        z: Activated update gate [N, C, ...] as returned by `gru_reset`, 0 to 1. float32, bfloat16, float16 or float64.
        n: Pre-activation of the candidate [N, C, ...], dtype and device of `z`.
        h: Previous state [N, C, ...] on the same device, in the dtype of `z`, or float32 beside 16-bit gates.

    Returns:
        h_next: [N, C, ...] in the dtype of `h`. Never aliases the inputs. channels_last where `z` is, contiguous
        otherwise.

    Raises:
        TypeError: if an argument is no tensor or its dtype is not among those above.
        ValueError: if shapes or devices disagree.

    Computed in float32 (float64 for float64) and rounded once on output; NaN propagates, +-Inf saturates the
    candidate. Contiguous and, for 4 dimensions, channels_last inputs are read in place, other strides are copied
    first. Under autocast `z` and `n` are cast to the autocast dtype and `h` to float32. Deterministic. Differentiable
    to any order; the gradient keeps only the inputs and recomputes the candidate, double backward, forward mode and
    torch.func run on the reference. Source: Cho et al. 2014 (arXiv:1406.1078), eq. 7-8.
    """
    _check_state(h)
    _check_gates("z", z, 1, h)
    _check_gates("n", n, 1, h)
    _check_dtypes("n", n, "z", z, h)
    if registration.needs_reference():
        return reference.gru_update(z, n, h)
    return registration.call(_update, z, n, h)


def _check_state(h):
    checks.check_tensor("h", h)
    if h.dim() < 2:
        raise ValueError(f"h must be [N, C, ...] with at least 2 dimensions, got {tuple(h.shape)}")


# Of tensors with so many blocks of channels; a text made for every call would take as long as the checks.
_MEANING = {
    1: "[N, C, ...] with C = h.shape[1]",
    2: "[N, 2*C, ...] with C = h.shape[1]",
    3: "[N, 3*C, ...] with C = h.shape[1]",
}


def _check_gates(name, gates, blocks, h):
    checks.check_tensor(name, gates)
    checks.check_same_device(name, gates, "h", h)
    batch, channels, *rest = h.shape
    checks.check_shape(name, gates, (batch, blocks * channels, *rest), _MEANING[blocks])


def _check_dtypes(other_name, other, name, gates, h):
    """Autocast brings the dtypes together itself; asking for it takes longer than to see that they are equal."""
    if h.dtype == gates.dtype and (other is None or other.dtype == gates.dtype):
        return
    if torch.is_autocast_enabled(gates.device.type):
        return
    if other is not None and other.dtype != gates.dtype:
        raise TypeError(f"{other_name} must be of the dtype of {name}, {gates.dtype}, got {other.dtype}")
    checks.check_state_dtype("h", h, name, gates)


def _empty(shape_of, dtype_of, layout_of):
    layout = registration.common_layout(layout_of)
    return torch.empty(shape_of.shape, dtype=dtype_of.dtype, device=shape_of.device, memory_format=layout)


def _gates_setup(ctx, inputs, output):
    *tensors, ctx.order = inputs
    ctx.save_for_backward(*tensors)


def _gates_gradient(ctx, grad_h_next):
    if grad_h_next is None:
        return None, None, None, None
    # With create_graph the gradient must itself be differentiable: the reference is made of PyTorch's own operators.
    backward = reference.gru_gates_backward if torch.is_grad_enabled() else _gates_backward
    grad_gates, grad_h = backward(grad_h_next, *ctx.saved_tensors, ctx.order)
    return grad_gates, grad_gates, grad_h, None


def _reset_gradient(ctx, grad_z, grad_rh):
    backward = reference.gru_reset_backward if torch.is_grad_enabled() else _reset_backward
    return *backward(grad_z, grad_rh, *ctx.saved_tensors, ctx.order), None


def _update_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _update_gradient(ctx, grad_h_next):
    if grad_h_next is None:
        return None, None, None
    backward = reference.gru_update_backward if torch.is_grad_enabled() else _update_backward
    return backward(grad_h_next, *ctx.saved_tensors)


_gates = registration.define(
    "gru_gates(Tensor x_gates, Tensor h_gates, Tensor h, str order) -> Tensor",
    reference=reference.gru_gates,
    fake=lambda x_gates, h_gates, h, order: _empty(h, h, x_gates),
    layout_of=0,
)
_gates_backward = registration.define(
    "gru_gates_backward(Tensor grad_h_next, Tensor x_gates, Tensor h_gates, Tensor h, str order) -> (Tensor, Tensor)",
    reference=reference.gru_gates_backward,
    fake=lambda grad_h_next, x_gates, h_gates, h, order: (_empty(x_gates, x_gates, x_gates), _empty(h, h, x_gates)),
    layout_of=1,
)
_reset = registration.define(
    "gru_reset(Tensor zr, Tensor h, str order) -> (Tensor, Tensor)",
    reference=reference.gru_reset,
    fake=lambda zr, h, order: (_empty(h, zr, zr), _empty(h, zr, zr)),
    layout_of=0,
)
_reset_backward = registration.define(
    "gru_reset_backward(Tensor? grad_z, Tensor? grad_rh, Tensor zr, Tensor h, str order) -> (Tensor, Tensor)",
    reference=reference.gru_reset_backward,
    fake=lambda grad_z, grad_rh, zr, h, order: (_empty(zr, zr, zr), _empty(h, h, zr)),
    layout_of=2,
)
_update = registration.define(
    "gru_update(Tensor z, Tensor n, Tensor h) -> Tensor",
    reference=reference.gru_update,
    fake=lambda z, n, h: _empty(h, h, z),
    layout_of=0,
)
_update_backward = registration.define(
    "gru_update_backward(Tensor grad_h_next, Tensor z, Tensor n, Tensor h) -> (Tensor, Tensor, Tensor)",
    reference=reference.gru_update_backward,
    fake=lambda grad_h_next, z, n, h: (_empty(z, z, z), _empty(n, n, z), _empty(h, h, z)),
    layout_of=1,
)
registration.define_gradient(_gates, setup_context=_gates_setup, backward=_gates_gradient)
registration.define_gradient(_reset, setup_context=_gates_setup, backward=_reset_gradient)
registration.define_gradient(_update, setup_context=_update_setup, backward=_update_gradient)
registration.forbid_gradient(_gates_backward, "call evkernels.ops.gru_gates and differentiate with create_graph=True")
registration.forbid_gradient(_reset_backward, "call evkernels.ops.gru_reset and differentiate with create_graph=True")
registration.forbid_gradient(_update_backward, "call evkernels.ops.gru_update and differentiate with create_graph=True")
registration.define_autocast(
    _gates, lambda dtype, x_gates, h_gates, h, order: (x_gates.to(dtype), h_gates.to(dtype), h.float(), order)
)
registration.define_autocast(_reset, lambda dtype, zr, h, order: (zr.to(dtype), h.float(), order))
registration.define_autocast(_update, lambda dtype, z, n, h: (z.to(dtype), n.to(dtype), h.float()))
