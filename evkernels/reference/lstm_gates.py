"""Definition of the ConvLSTM gate update: forward and hand-written backward in plain PyTorch."""

import torch
from torch import Tensor


def lstm_gates(gates: Tensor, c: Tensor, order: str = "ifgo") -> tuple[Tensor, Tensor]:
    i, f, g, o = _activations(gates, order)
    c_next = f * c.to(f.dtype) + i * g
    return (o * c_next.tanh()).to(gates.dtype), c_next.to(c.dtype)


def lstm_gates_backward(
    grad_h: Tensor | None, grad_c_next: Tensor | None, gates: Tensor, c: Tensor, order: str = "ifgo"
) -> tuple[Tensor, Tensor]:
    i, f, g, o = _activations(gates, order)
    c_wide = c.to(f.dtype)
    tanh_c = (f * c_wide + i * g).tanh()
    d_h = torch.zeros_like(tanh_c) if grad_h is None else grad_h.to(f.dtype)
    d_c_next = d_h * o * (1 - tanh_c * tanh_c)
    if grad_c_next is not None:
        d_c_next = d_c_next + grad_c_next.to(f.dtype)
    blocks = {
        "i": d_c_next * g * i * (1 - i),
        "f": d_c_next * c_wide * f * (1 - f),
        "g": d_c_next * i * (1 - g * g),
        "o": d_h * tanh_c * o * (1 - o),
    }
    grad_gates = torch.cat([blocks[name] for name in order], dim=1)
    return grad_gates.to(gates.dtype), (d_c_next * f).to(c.dtype)


def _activations(gates: Tensor, order: str) -> list[Tensor]:
    """i, f, g, o after their activations, in at least float32, whatever their order in `gates`."""
    wide = gates.to(torch.promote_types(gates.dtype, torch.float32))
    blocks = dict(zip(order, wide.chunk(4, dim=1), strict=True))
    return [blocks["i"].sigmoid(), blocks["f"].sigmoid(), blocks["g"].tanh(), blocks["o"].sigmoid()]
