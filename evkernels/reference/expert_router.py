"""Definition of the router of a mixture of experts: forward and hand-written backward in plain PyTorch."""

import torch
from torch import Tensor

from evkernels.reference.time_basis import widened


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
    *_, weights = _layers(*widened(x, weight1, bias1, weight2, bias2, weight3, bias3))
    gates = torch.where(_ranks(weights) < top, weights, 0)
    return weights.to(x.dtype), gates.to(x.dtype)


def expert_router_backward(
    grad_weights: Tensor | None,
    grad_gates: Tensor | None,
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor,
    bias3: Tensor,
    top: int,
) -> tuple[Tensor, ...]:
    """Gradients of all tensors in their order."""
    wide, *parameters = widened(x, weight1, bias1, weight2, bias2, weight3, bias3)
    first, second, weights = _layers(wide, *parameters)
    grad = torch.zeros_like(weights)
    if grad_weights is not None:
        grad = grad + grad_weights
    if grad_gates is not None:
        grad = grad + torch.where(_ranks(weights) < top, grad_gates, 0)
    d_logits = weights * (grad - (weights * grad).sum(dim=0))
    d_second = torch.where(second == 0, 0, parameters[4].T @ d_logits)
    d_first = torch.where(first == 0, 0, parameters[2].T @ d_second)
    gradients = (
        d_first.T @ parameters[0],
        *(d_first @ wide, d_first.sum(dim=1)),
        *(d_second @ first.T, d_second.sum(dim=1)),
        *(d_logits @ second.T, d_logits.sum(dim=1)),
    )
    return tuple(gradient.to(x.dtype) for gradient in gradients)


def _layers(x, weight1, bias1, weight2, bias2, weight3, bias3) -> tuple[Tensor, Tensor, Tensor]:
    """Both hidden layers and the softmax, each [size, N]."""
    first = (weight1 @ x.T + bias1[:, None]).relu()
    second = (weight2 @ first + bias2[:, None]).relu()
    return first, second, (weight3 @ second + bias3[:, None]).softmax(dim=0)


def _ranks(weights: Tensor) -> Tensor:
    """How many are larger, or equal and before, along the first axis; for few, topk takes ten times as long."""
    own, others = weights[:, None], weights[None]
    before = torch.ones(len(weights), len(weights), dtype=torch.bool, device=weights.device).tril(-1)[..., None]
    return (torch.where(before, others >= own, others > own)).sum(dim=1)
