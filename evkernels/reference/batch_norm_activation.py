"""Definition of batch norm and activation: forward and hand-written backward in plain PyTorch."""

from torch import Tensor

from evkernels.reference.depthwise_conv2d import ACTIVATIONS, activation_gradient
from evkernels.reference.separable_conv2d import _widened
from evkernels.reference.separable_norm_conv2d import _affine, _norm_gradient, _normal, _statistics


def batch_norm_activation(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none", eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    wide, weight, bias = _widened(x, weight, bias)
    statistics = _statistics(wide, 0)
    y = ACTIVATIONS[activation](_affine(_normal(wide, statistics, eps), weight, bias))
    return y.to(x.dtype), statistics[:, 0]


def batch_norm_activation_backward(
    grad_output: Tensor, x: Tensor, weight: Tensor, bias: Tensor, statistics: Tensor, activation: str, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide, weight, bias, gradient = _widened(x, weight, bias, grad_output)
    normal = _normal(wide, statistics[:, None], eps)
    d_norm = activation_gradient(activation, _affine(normal, weight, bias), gradient)
    d_x = _norm_gradient(d_norm, normal, weight, statistics[:, None], 0, eps)
    pixels = (0, 2, 3)
    return tuple(d.to(x.dtype) for d in (d_x, (d_norm * normal).sum(pixels), d_norm.sum(pixels)))
