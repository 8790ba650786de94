"""Losses over the batches of all processes of a group, with gradients through the gathering."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from evkernels import ops


class _AllGather(torch.autograd.Function):
    """Every process's tensor, in order of rank; the gradient of one's own is the sum of what all processes found."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.count = group, len(x)
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        begin = dist.get_rank(ctx.group) * ctx.count
        return grad[begin : begin + ctx.count], None


def all_gather_with_gradient(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """The tensors [B, ...] of all processes of the group, [world_size * B, ...]; B is the same everywhere."""
    return _AllGather.apply(x, group)


def is_distributed(group: dist.ProcessGroup | None = None) -> bool:
    """True where there are other processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def distributed_contrastive_loss(
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor | float,
    queue: Tensor | None = None,
    symmetric: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """`ops.contrastive_loss` with the pairs of all processes as one batch; without other processes the op itself.

    Args:
        a, b, logit_scale, queue, symmetric: As of the op; every process has as many pairs. The queue is each process's.
        group: The processes, None for all.

    Returns:
        loss: [] this process's share: the mean over its own pairs. The mean of all shares is the loss of the whole
        batch, and the mean of all gradients, which DistributedDataParallel takes, is its gradient. Each process does
        the work of its own rows and columns only.

    Raises:
        ValueError: as the op.
    """
    if not is_distributed(group):
        return ops.contrastive_loss(a, b, logit_scale, queue, symmetric)
    own = slice(dist.get_rank(group) * len(a), (dist.get_rank(group) + 1) * len(a))

    def of_others(x: Tensor, *more: Tensor) -> Tensor:
        every = all_gather_with_gradient(x, group)
        return torch.cat([every[: own.start], every[own.stop :], *more])

    negatives = of_others(b, *[queue] * (queue is not None))
    loss = ops.contrastive_loss(a, b, logit_scale, negatives, symmetric=False)
    if not symmetric:
        return loss
    return (loss + ops.contrastive_loss(b, a, logit_scale, of_others(a), symmetric=False)) / 2
