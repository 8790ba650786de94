"""Definition of the two ConvGRU updates, each with a hand-written backward, in plain PyTorch.

`gru_gates` is the form whose reset gate acts after the convolution of h, all in one step. The classic form convolves
r*h, so its two pointwise steps stand on either side of that convolution: `gru_reset` and `gru_update`.
"""

import torch
from torch import Tensor


def gru_gates(x_gates: Tensor, h_gates: Tensor, h: Tensor, order: str = "zrn") -> Tensor:
    z, _, n, h_wide = _activations(x_gates, h_gates, h, order)
    return ((1 - z) * h_wide + z * n).to(h.dtype)


def gru_gates_backward(
    grad_h_next: Tensor, x_gates: Tensor, h_gates: Tensor, h: Tensor, order: str = "zrn"
) -> tuple[Tensor, Tensor]:
    """One gradient serves `x_gates` and `h_gates`, which enter only by their sum and, in block n, beside each other."""
    z, r, n, h_wide = _activations(x_gates, h_gates, h, order)
    d_h_next = _wide(grad_h_next)
    d_n = d_h_next * z * (1 - n) * (1 + n)
    blocks = {"z": d_h_next * (n - h_wide) * z * (1 - z), "r": d_n * h_wide * r * (1 - r), "n": d_n}
    grad_gates = torch.cat([blocks[name] for name in order], dim=1)
    return grad_gates.to(x_gates.dtype), (d_h_next * (1 - z) + d_n * r).to(h.dtype)


def gru_reset(zr: Tensor, h: Tensor, order: str = "zr") -> tuple[Tensor, Tensor]:
    z, r = _reset_activations(zr, order)
    return z.to(zr.dtype), (r * _wide(h)).to(zr.dtype)


def gru_reset_backward(
    grad_z: Tensor | None, grad_rh: Tensor | None, zr: Tensor, h: Tensor, order: str = "zr"
) -> tuple[Tensor, Tensor]:
    z, r = _reset_activations(zr, order)
    d_z = torch.zeros_like(z) if grad_z is None else _wide(grad_z)
    d_rh = torch.zeros_like(r) if grad_rh is None else _wide(grad_rh)
    blocks = {"z": d_z * z * (1 - z), "r": d_rh * _wide(h) * r * (1 - r)}
    return torch.cat([blocks[name] for name in order], dim=1).to(zr.dtype), (d_rh * r).to(h.dtype)


def gru_update(z: Tensor, n: Tensor, h: Tensor) -> Tensor:
    z = _wide(z)
    return ((1 - z) * _wide(h) + z * _wide(n).tanh()).to(h.dtype)


def gru_update_backward(grad_h_next: Tensor, z: Tensor, n: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    d_h_next, z_wide, candidate = _wide(grad_h_next), _wide(z), _wide(n).tanh()
    d_z = d_h_next * (candidate - _wide(h))
    d_n = d_h_next * z_wide * (1 - candidate) * (1 + candidate)
    return d_z.to(z.dtype), d_n.to(n.dtype), (d_h_next * (1 - z_wide)).to(h.dtype)


def _activations(x_gates: Tensor, h_gates: Tensor, h: Tensor, order: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """z, r, n after their activations and h, in at least float32, whatever the order of the blocks."""
    blocks = dict(zip(order, (_wide(x_gates) + _wide(h_gates)).chunk(3, dim=1), strict=True))
    z, r, h_wide = blocks["z"].sigmoid(), blocks["r"].sigmoid(), _wide(h)
    return z, r, (blocks["n"] + r * h_wide).tanh(), h_wide


def _reset_activations(zr: Tensor, order: str) -> tuple[Tensor, Tensor]:
    blocks = dict(zip(order, _wide(zr).chunk(2, dim=1), strict=True))
    return blocks["z"].sigmoid(), blocks["r"].sigmoid()


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
