"""Recall at k of retrieving each row's own partner by cosine, in plain PyTorch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from evkernels.reference.contrastive_loss import unit_rows


def retrieval_recall(queries: Tensor, targets: Tensor, ks: Sequence[int] = (1, 5, 10)) -> Tensor:
    p, q = unit_rows(queries), unit_rows(targets)
    similarities = p @ q.T
    own = similarities.diagonal()[:, None]
    before = torch.ones_like(similarities, dtype=torch.bool).tril(-1)
    ranks = (similarities > own).sum(1) + ((similarities == own) & before).sum(1)
    return share_within(ranks, own[:, 0], ks)


def share_within(ranks: Tensor, own: Tensor, ks: Sequence[int]) -> Tensor:
    """The share of ranks below each k, float64 [len(ks)]; a similarity that is no number is never found."""
    found = torch.stack([(ranks < k) & ~own.isnan() for k in ks]) if ks else ranks.new_empty((0, len(ranks)))
    return found.double().mean(1)
