"""ConvGRUs of RAFT and RAFT-Stereo: h before x in every convolution, context terms, separable kernels.

Callers iterate themselves, so these are single steps. The update is the classic one, on `gru_reset` and `gru_update`.
"""

import torch
from torch import Tensor, nn

from evkernels import ops

Context = tuple[Tensor, Tensor, Tensor]


class ConvGRU(nn.Module):
    """RAFT's ConvGRU, with the context terms of RAFT-Stereo.

    Equivalent to (cz, cr, cq = context, or zeros)::

        hx = torch.cat([h, x], dim=1)
        z = torch.sigmoid(convz(hx) + cz)
        r = torch.sigmoid(convr(hx) + cr)
        q = torch.tanh(convq(torch.cat([r * h, x], dim=1)) + cq)
        h_next = (1 - z) * h + z * q

    Args:
        hidden_dim: Channels of h.
        input_dim: Channels of x.
        kernel_size: Odd side of the square kernels.

    Raises:
        ValueError: if `kernel_size` is even.

    State dict: `convz`, `convr`, `convq`, each `.weight` [hidden_dim, hidden_dim + input_dim, k, k] and `.bias`;
    initialised as torch.nn.Conv2d. h keeps its dtype: float32 beside 16-bit inputs stays float32. Source: Teed and Deng
    2020 (arXiv:2003.12039); Lipson et al. 2021 (arXiv:2109.07547).
    """

    def __init__(self, hidden_dim: int = 128, input_dim: int = 192 + 128, kernel_size: int = 3) -> None:
        super().__init__()
        _check_odd(kernel_size)
        self.convz, self.convr, self.convq = _convolutions(hidden_dim, input_dim, (kernel_size, kernel_size))

    def forward(self, h: Tensor, x: Tensor, context: Context | None = None) -> Tensor:
        """One step.

        Args:
            h: State [N, hidden_dim, H, W].
            x: Input [N, input_dim, H, W].
            context: cz, cr, cq [N, hidden_dim, H, W] each, in the dtype of x, added to the pre-activations; or None.

        Returns:
            h: the next state. Does not alias an input.
        """
        return _step(h, x, context, self.convz, self.convr, self.convq)


class StereoConvGRU(ConvGRU):
    """RAFT-Stereo's call of the same layer: `layer(h, cz, cr, cq, *inputs)`, the inputs joined along channels.

    Equivalent to::

        h_next = ConvGRU.forward(h, torch.cat(inputs, dim=1), (cz, cr, cq))

    Arguments, state dict and errors as in ConvGRU.
    """

    def __init__(self, hidden_dim: int, input_dim: int, kernel_size: int = 3) -> None:
        super().__init__(hidden_dim, input_dim, kernel_size)

    def forward(self, h: Tensor, cz: Tensor, cr: Tensor, cq: Tensor, *inputs: Tensor) -> Tensor:
        return super().forward(h, torch.cat(inputs, dim=1), (cz, cr, cq))


class SepConvGRU(nn.Module):
    """RAFT's separable ConvGRU: one update with kernels 1 x k, then one with k x 1.

    Equivalent to::

        for convz, convr, convq in ((convz1, convr1, convq1), (convz2, convr2, convq2)):
            hx = torch.cat([h, x], dim=1)
            z = torch.sigmoid(convz(hx) + cz)
            r = torch.sigmoid(convr(hx) + cr)
            q = torch.tanh(convq(torch.cat([r * h, x], dim=1)) + cq)
            h = (1 - z) * h + z * q

    Args:
        hidden_dim: Channels of h.
        input_dim: Channels of x.
        kernel_size: Odd length of the kernels.

    Raises:
        ValueError: if `kernel_size` is even.

    State dict: `convz1`, `convr1`, `convq1` of shape [hidden_dim, hidden_dim + input_dim, 1, k] and `convz2`, `convr2`,
    `convq2` [..., k, 1], each `.weight` and `.bias`; initialised as torch.nn.Conv2d. Source: Teed and Deng 2020
    (arXiv:2003.12039); the context terms, added in both updates, as in ConvGRU.
    """

    def __init__(self, hidden_dim: int = 128, input_dim: int = 192 + 128, kernel_size: int = 5) -> None:
        super().__init__()
        _check_odd(kernel_size)
        self.convz1, self.convr1, self.convq1 = _convolutions(hidden_dim, input_dim, (1, kernel_size))
        self.convz2, self.convr2, self.convq2 = _convolutions(hidden_dim, input_dim, (kernel_size, 1))

    def forward(self, h: Tensor, x: Tensor, context: Context | None = None) -> Tensor:
        """One step, as ConvGRU."""
        h = _step(h, x, context, self.convz1, self.convr1, self.convq1)
        return _step(h, x, context, self.convz2, self.convr2, self.convq2)


def _check_odd(kernel_size):
    if kernel_size % 2 != 1:
        raise ValueError(f"kernel_size must be odd, so that height and width stay, got {kernel_size}")


def _convolutions(hidden_dim, input_dim, kernel_size):
    padding = tuple(side // 2 for side in kernel_size)
    return (nn.Conv2d(hidden_dim + input_dim, hidden_dim, kernel_size, padding=padding) for _ in range(3))


def _step(h, x, context, convz, convr, convq):
    hx = torch.cat([h.to(x.dtype), x], dim=1)
    zr = torch.cat([convz(hx), convr(hx)], dim=1)
    if context is not None:
        zr = zr + torch.cat(context[:2], dim=1)
    z, rh = ops.gru_reset(zr, h)
    n = convq(torch.cat([rh, x], dim=1))
    return ops.gru_update(z, n if context is None else n + context[2], h)
