"""Definition of the gated sums of basis functions of time: forward and hand-written backward in plain PyTorch."""

import torch
from torch import Tensor


def time_basis(t: Tensor, gate: Tensor, rate: Tensor, shift: Tensor, weight: Tensor, kind: str) -> Tensor:
    time, factor, rates, shifts, weights = widened(t, gate, rate, shift, weight)
    chosen = (factor != 0)[:, None]
    value, _ = _basis(torch.where(chosen, time[:, None], 0)[..., None] * rates + shifts, kind)
    sums = (value * weights).sum(dim=-1) * factor[:, None]
    return torch.where(chosen, sums, 0).to(t.dtype)


def time_basis_backward(
    grad_embedding: Tensor, t: Tensor, gate: Tensor, rate: Tensor, shift: Tensor, weight: Tensor, kind: str
) -> tuple[Tensor, ...]:
    """Gradients of all tensors in their order."""
    grad, time, factor, rates, shifts, weights = widened(grad_embedding, t, gate, rate, shift, weight)
    chosen = (factor != 0)[:, None]
    grad, time = torch.where(chosen, grad, 0), torch.where(chosen, time[:, None], 0)[..., None]
    value, slope = _basis(time * rates + shifts, kind)
    gated = (grad * factor[:, None])[..., None]
    d_argument = gated * weights * slope
    gradients = (
        (d_argument * rates).sum(dim=(1, 2)),
        (grad * (value * weights).sum(dim=-1)).sum(dim=1),
        (d_argument * time).sum(dim=0),
        d_argument.sum(dim=0),
        (gated * value).sum(dim=0),
    )
    return tuple(gradient.to(t.dtype) for gradient in gradients)


def _basis(z: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The basis function and its derivative."""
    if kind == "cosine":
        return z.cos(), -z.sin()
    if kind == "stepped_cubic":
        segments = z.shape[-1] - 1
        u = z.clamp(0, 1)
        square = ((u * segments).ceil() == torch.arange(segments + 1, device=z.device)) * (1 - u) ** 2
        return square * (1 - u) / 6, torch.where(z < 0, 0, -square / 2)
    square = z * z
    bell = torch.exp(-0.5 * square)
    if kind == "gaussian":
        return bell, -z * bell
    if kind == "mexican_hat":
        return (1 - square) * bell, z * (square - 3) * bell
    cosine, sine = (5 * z).cos(), (5 * z).sin()
    return cosine * bell, -(z * cosine + 5 * sine) * bell


def widened(*values: Tensor) -> list[Tensor]:
    """Everything in the dtype of the computation: at least float32."""
    return [value.to(torch.promote_types(value.dtype, torch.float32)) for value in values]
