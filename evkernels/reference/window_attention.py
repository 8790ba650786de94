"""Definition of attention within the partitions of a map: forward and hand-written backward in plain PyTorch."""

import torch
from torch import Tensor

from evkernels.reference.time_basis import widened


def window_attention(
    qkv: Tensor, bias: Tensor | None, heads: int, window: tuple[int, int], partition: str = "window"
) -> Tensor:
    q, k, v = _heads(qkv, bias, heads, window, partition)
    return to_map(_shares(q, k) @ v, qkv, window, partition)


def window_attention_backward(
    grad_output: Tensor, qkv: Tensor, bias: Tensor | None, heads: int, window: tuple[int, int], partition: str
) -> Tensor:
    """The gradient of qkv; that of the bias is its sum over all pixels."""
    q, k, v = _heads(qkv, bias, heads, window, partition)
    shares = _shares(q, k)
    (grad,) = widened(to_tokens(grad_output, window, partition).unflatten(-1, (heads, -1)).transpose(1, 2))
    d_shares = grad @ v.mT
    d_scores = shares * (d_shares - (shares * d_shares).sum(dim=-1, keepdim=True)) * q.shape[-1] ** -0.5
    gradients = torch.cat([d_scores @ k, d_scores.mT @ q, shares.mT @ grad], dim=-1)
    return to_map(gradients, qkv, window, partition)


def to_tokens(x: Tensor, window: tuple[int, int], partition: str) -> Tensor:
    """[N, H, W, C] to [N * partitions, rows * columns, C]."""
    rows, columns = window
    if partition == "window":
        x = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).permute(0, 1, 3, 2, 4, 5)
    else:
        x = x.unflatten(2, (columns, -1)).unflatten(1, (rows, -1)).permute(0, 2, 4, 1, 3, 5)
    return x.flatten(3, 4).flatten(0, 2)


def to_map(x: Tensor, qkv: Tensor, window: tuple[int, int], partition: str) -> Tensor:
    """[N * partitions, heads, tokens, channels of a head] to a contiguous map in the dtype of qkv."""
    n, height, width, _ = qkv.shape
    rows, columns = window
    x = x.transpose(1, 2).flatten(2).unflatten(1, (rows, columns))
    x = x.unflatten(0, (n, height // rows, width // columns))
    x = x.permute((0, 1, 3, 2, 4, 5) if partition == "window" else (0, 3, 1, 4, 2, 5))
    return x.flatten(3, 4).flatten(1, 2).to(qkv.dtype).contiguous()


def _heads(qkv, bias, heads, window, partition) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value, [N * partitions, heads, rows * columns, dim] each."""
    wide = widened(qkv) if bias is None else [sum(widened(qkv, bias))]
    return to_tokens(wide[0], window, partition).unflatten(-1, (heads, -1)).transpose(1, 2).chunk(3, dim=-1)


def _shares(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
