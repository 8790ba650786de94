"""Mean squared difference and mean cosine of normalised rows, in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from evkernels.reference.contrastive_loss import unit_rows, unit_rows_backward


def normalized_mse_cosine(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    p, q = unit_rows(a), unit_rows(b)
    return F.mse_loss(p, q).to(a.dtype), (p * q).sum(1).mean().to(a.dtype)


def normalized_mse_cosine_backward(
    grad_mse: Tensor | None, grad_cosine: Tensor | None, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    p, q = unit_rows(a), unit_rows(b)
    d_p, d_q = torch.zeros_like(p), torch.zeros_like(q)
    if grad_mse is not None:
        d_p = grad_mse.to(p.dtype) * (2 / max(p.numel(), 1)) * (p - q)
        d_q = -d_p
    if grad_cosine is not None:
        share = grad_cosine.to(p.dtype) / len(p)
        d_p, d_q = d_p + share * q, d_q + share * p
    return unit_rows_backward(d_p, a), unit_rows_backward(d_q, b)
