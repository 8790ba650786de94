"""Definition of the blurred soft pooling: forward and hand-written backward in plain PyTorch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from evkernels.reference.time_basis import widened


def blur_soft_pool2d(x: Tensor, stride: int = 2, temperature: float = 1.0) -> Tensor:
    (wide,) = widened(x)
    values = _windows(_blurred(wide), stride)
    return (_shares(values, temperature) * values).sum(0).to(x.dtype)


def blur_soft_pool2d_backward(grad_output: Tensor, x: Tensor, stride: int, temperature: float) -> Tensor:
    """Gradient of x."""
    grad, wide = widened(grad_output, x)
    values = _windows(_blurred(wide), stride)
    shares = _shares(values, temperature)
    mean = (shares * values).sum(0)
    d_values = grad * shares * (1 + (values - mean) / temperature)
    # Each value back to its pixel: a transposed convolution with a window that holds one of the four.
    rows, columns = d_values.shape[-2:]
    places = torch.eye(4, dtype=wide.dtype, device=wide.device).view(4, 1, 2, 2)
    d_blurred = F.conv_transpose2d(d_values.flatten(1, 2).transpose(0, 1), places, stride=stride)
    right, below = x.shape[3] - (columns - 1) * stride - 2, x.shape[2] - (rows - 1) * stride - 2
    d_blurred = F.pad(d_blurred, (0, right, 0, below)).reshape(x.shape)
    return _blurred(d_blurred).to(x.dtype)


def _blurred(x: Tensor) -> Tensor:
    """Each plane with the binomial filter [1, 2, 1] x [1, 2, 1] / 16 and a border of zeros, its own transpose."""
    line = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype, device=x.device)
    blur = (line[:, None] * line / 16).view(1, 1, 3, 3)
    return F.conv2d(x.flatten(0, 1)[:, None], blur, padding=1).view(x.shape)


def _windows(x: Tensor, stride: int) -> Tensor:
    """The four values of each 2 x 2 window [4, N, C, H', W']."""
    height, width = (size - 1 for size in x.shape[2:])
    return torch.stack([x[:, :, i : i + height : stride, j : j + width : stride] for i in (0, 1) for j in (0, 1)])


def _shares(values: Tensor, temperature: float) -> Tensor:
    """Of each value in the mean. Only what is above zero is taken out of the exponents: below nothing overflows."""
    scaled = values / temperature
    largest = scaled.detach().amax(0).clamp(min=0)
    weights = (scaled - largest).exp()
    return weights / (weights.sum(0) + 4e-6 * (-largest).exp())
