"""Definition of batch norm, activation and projection: forward and hand-written backward in plain PyTorch."""

from torch import Tensor

from evkernels.reference.depthwise_conv2d import ACTIVATIONS, activation_gradient
from evkernels.reference.separable_conv2d import _widened
from evkernels.reference.separable_norm_conv2d import _affine, _norm_gradient, _normal, _statistics


def batch_norm_activation(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    projection: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    wide, weight, bias, projection = _widened(x, weight, bias, projection)
    statistics = _statistics(wide, 0)
    y = ACTIVATIONS[activation](_affine(_normal(wide, statistics, eps), weight, bias))
    if projection is not None:
        y = (y * projection[:, None, None]).sum(1, keepdim=True)
    return y.to(x.dtype), statistics[:, 0]


def batch_norm_activation_backward(
    grad_output: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    projection: Tensor | None,
    statistics: Tensor,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the projection, if it is None, an empty tensor."""
    wide, weight, bias, projection, gradient = _widened(x, weight, bias, projection, grad_output)
    normal = _normal(wide, statistics[:, None], eps)
    z = _affine(normal, weight, bias)
    pixels = (0, 2, 3)
    d_projection = x.new_empty(0)
    if projection is not None:
        d_projection = (gradient * ACTIVATIONS[activation](z)).sum(pixels)
        gradient = gradient * projection[:, None, None]
    d_norm = activation_gradient(activation, z, gradient)
    d_x = _norm_gradient(d_norm, normal, weight, statistics[:, None], 0, eps)
    gradients = (d_x, (d_norm * normal).sum(pixels), d_norm.sum(pixels), d_projection)
    return tuple(d.to(x.dtype) for d in gradients)
