"""Symmetric InfoNCE of normalised rows with an optional queue of negatives, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def contrastive_loss(
    a: Tensor, b: Tensor, logit_scale: Tensor | float, queue: Tensor | None = None, symmetric: bool = True
) -> Tensor:
    scale = logit_scale if isinstance(logit_scale, Tensor) else torch.tensor(logit_scale, device=a.device)
    return contrastive_loss_kernel(a, b, scale, queue, symmetric)[0]


def contrastive_loss_kernel(
    a: Tensor, b: Tensor, logit_scale: Tensor, queue: Tensor | None, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the log of the sums of the exponentials of each row and, if symmetric, each column [B]."""
    p, q, scale = unit_rows(a), unit_rows(b, queue), logit_scale.to(_wide(a))
    logits = scale * (p @ q.T)
    rows, matching = logits.logsumexp(1), logits.diagonal()
    loss = (rows - matching).mean()
    columns = logits.new_empty(0)
    if symmetric:
        columns = logits[:, : len(b)].logsumexp(0)
        loss = (loss + (columns - matching).mean()) / 2
    return loss.to(a.dtype), rows, columns


def contrastive_loss_backward(
    grad_loss: Tensor,
    a: Tensor,
    b: Tensor,
    logit_scale: Tensor,
    queue: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    symmetric: bool,
    need_a: bool,
    need_b: bool,
    need_scale: bool,
    need_queue: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a, b, logit_scale and queue; those that are not needed are empty."""
    count = len(b)
    p, q, scale = unit_rows(a), unit_rows(b, queue), logit_scale.to(_wide(a))
    logits = scale * (p @ q.T)
    d_logits = (logits - rows[:, None]).exp()
    if symmetric:
        d_logits = d_logits + F.pad((logits[:, :count] - columns).exp(), (0, len(q) - count))
    matching = torch.eye(*d_logits.shape, dtype=logits.dtype, device=logits.device)
    share = grad_loss.to(logits.dtype) / (2 * count if symmetric else count)
    d_cosines = share * (d_logits - (2 if symmetric else 1) * matching)
    d_p, d_q = d_cosines @ q, d_cosines.T @ p
    d_scale = (d_p * p).sum()
    results = (
        unit_rows_backward(scale * d_p, a),
        unit_rows_backward(scale * d_q[:count], b),
        d_scale.to(logit_scale.dtype),
        a.new_empty(0) if queue is None else unit_rows_backward(scale * d_q[count:], queue),
    )
    needed = (need_a, need_b, need_scale, need_queue)
    return tuple(d if wanted else a.new_empty(0) for d, wanted in zip(results, needed, strict=True))


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def unit_rows(*parts: Tensor | None) -> Tensor:
    """All rows of the parts in float32 or float64, of length 1."""
    return F.normalize(torch.cat([part.to(_wide(part)) for part in parts if part is not None]), dim=1)


def unit_rows_backward(d_p: Tensor, x: Tensor, eps: float = 1e-12) -> Tensor:
    """From the gradient of F.normalize(x) to that of x."""
    wide = x.to(d_p.dtype)
    norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    p = wide / norm.clamp_min(eps)
    along = torch.where(norm >= eps, (d_p * p).sum(1, keepdim=True), torch.zeros_like(norm))
    return ((d_p - along * p) / norm.clamp_min(eps)).to(x.dtype)
