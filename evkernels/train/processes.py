"""Several processes that train one network together: `torchrun --nproc-per-node N -m evkernels train ...`.

Each has its share of a batch's sequences. Batch norms see the whole batch, and losses are divided by what the whole
batch counts, so the numbers are those of one process, up to rounding.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@contextmanager
def group(device: torch.device) -> Iterator[torch.device]:
    """The group of the processes that torchrun started, none without it; yields this process's device.

    What communicates (a DistributedDataParallel) belongs into a function that ends inside: if it outlives the group, it
    is the last to hold gloo's threads, and joins them with Python's lock, which they may be waiting for.
    """
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        yield device
        return
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", dist.get_node_local_rank(0))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        # DistributedDataParallel lies in a cycle of references.
        gc.collect()
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, 0 for the one that writes."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def count() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(value: Tensor) -> Tensor:
    """The sum of all processes' values; carries no gradient."""
    value = value.detach().clone()
    if count() > 1:
        dist.all_reduce(value)
    return value


def gathered(value: Any) -> list[Any]:
    """The values of all processes, in the order of their numbers, in each of them."""
    values = [value]
    if count() > 1:
        values = [None] * count()
        dist.all_gather_object(values, value)
    return values


def wait() -> None:
    """Until all processes are here."""
    if count() > 1:
        dist.barrier()


def synchronized(model: nn.Module) -> nn.Module:
    """The model with batch norms that see the whole batch; parameters and state-dict keys stay."""
    if count() == 1:
        return model
    if next(model.parameters()).device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in list(model.modules()):
        for name, child in module.named_children():
            kind = {nn.BatchNorm1d: SynchronizedBatchNorm1d, nn.BatchNorm2d: SynchronizedBatchNorm2d}.get(type(child))
            if kind:
                module.add_module(name, kind.like(child))
    return model


class _Total(torch.autograd.Function):
    """`total` with its gradient, which is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        return total(value)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return total(gradient)


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batches of all processes; torch's own SyncBatchNorm refuses the CPU.

    A process's batch may be empty. Source: as torch.nn.BatchNorm2d, with momentum.
    """

    @classmethod
    def like(cls, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> SynchronizedBatchNorm2d:
        """With the parameters and buffers of another, shared."""
        layer = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        layer._parameters, layer._buffers = norm._parameters, norm._buffers
        return layer.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        pixels = x.shape[0] * x.shape[2] * x.shape[3]
        sums = _Total.apply(torch.cat([wide.sum((0, 2, 3)), wide.new_tensor([pixels])]))
        mean, number = sums[:-1] / sums[-1], sums[-1].detach()
        centred = wide - mean[:, None, None]
        variance = _Total.apply(centred.square().sum((0, 2, 3))) / number
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            unbiased = variance * (number / (number - 1).clamp(min=1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        y = centred * scale[:, None, None] + self.bias[:, None, None]
        return y.to(x.dtype)


class SynchronizedBatchNorm1d(SynchronizedBatchNorm2d):
    """The same for features [N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, None, None])[:, :, 0, 0]


def in_parallel(module: nn.Module) -> nn.Module:
    """The module whose gradients are the means over all processes."""
    if count() == 1:
        return module
    # Buffers stay equal: batch norms see the same statistics.
    return nn.parallel.DistributedDataParallel(module, forward_sync_buffers=False)
