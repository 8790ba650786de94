"""Depthwise-separable convolutions as modules: the bare pair, and the normalised block of event encoders."""

from functools import partial

import torch
from torch import Tensor, nn

from evkernels import ops

_ACTIVATIONS = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, "tanh"),
    "sigmoid": nn.Sigmoid,
}


class SeparableConv2d(nn.Module):
    """Depthwise k x k convolution, activation, 1 x 1 convolution and activation in one fused op.

    Equivalent to::

        output_activation(pointwise(activation(depthwise(x))))

    with `depthwise` and `pointwise` of type `torch.nn.Conv2d`, whose names, shapes and initialisation the parameters
    have: depthwise.weight, depthwise.bias, pointwise.weight, pointwise.bias.

    Args:
        in_channels: C of the input [N, C, H, W].
        out_channels: O of the output [N, O, H', W'].
        kernel_size: k, odd and at most 31.
        stride: 1 or 2.
        padding: Zeros around the input; None is kernel_size // 2.
        bias: Whether both convolutions have one.
        activation: What follows the depthwise convolution: "none", "relu", "silu", "gelu" (exact,
            with erf), "gelu_tanh" or "sigmoid".
        output_activation: What follows the pointwise convolution.

    Computed by `evkernels.ops.separable_conv2d`, which documents precision, layouts and gradients.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        bias: bool = True,
        activation: str = "none",
        output_activation: str = "none",
    ):
        super().__init__()
        self.stride = stride
        self.padding = kernel_size // 2 if padding is None else padding
        self.activation = activation
        self.output_activation = output_activation
        self.depthwise = nn.Conv2d(
            in_channels, in_channels, kernel_size, stride, self.padding, groups=in_channels, bias=bias
        )
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Input [N, C, H, W] to output [N, O, H', W']."""
        return ops.separable_conv2d(
            x,
            self.depthwise.weight,
            self.pointwise.weight,
            self.depthwise.bias,
            self.pointwise.bias,
            self.stride,
            self.padding,
            self.activation,
            self.output_activation,
        )

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, output_activation={self.output_activation!r}"


class SeparableBlock(nn.Sequential):
    """Depthwise convolution, batch norm, activation, 1 x 1 convolution, batch norm, activation.

    Equivalent to::

        nn.Sequential(
            nn.Conv2d(C, C, k, stride, k // 2, groups=C), nn.BatchNorm2d(C), activation,
            nn.Conv2d(C, O, 1), nn.BatchNorm2d(O), activation,
        )

    and it is that Sequential, with its state-dict keys 0, 1, 3 and 4 (a block of the EfficientConvLSTM encoder). While
    both norms are in evaluation mode their current statistics are folded into the weights at every call and the block
    is one fused op; gradients flow through the fold. While a norm is in training mode only the depthwise convolution
    is fused.

    Args:
        in_channels: C of the input [N, C, H, W].
        out_channels: O of the output [N, O, H', W'].
        kernel_size: k, odd and at most 31; the padding is k // 2.
        stride: 1 or 2.
        activation: "none", "relu", "silu", "gelu" (exact, with erf), "gelu_tanh" or "sigmoid", in both places.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, activation: str = "gelu"
    ):
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
        super().__init__(
            nn.Conv2d(in_channels, in_channels, kernel_size, stride, kernel_size // 2, groups=in_channels),
            nn.BatchNorm2d(in_channels),
            _ACTIVATIONS[activation](),
            nn.Conv2d(in_channels, out_channels, 1),
            nn.BatchNorm2d(out_channels),
            _ACTIVATIONS[activation](),
        )
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Input [N, C, H, W] to output [N, O, H', W']."""
        depthwise, norm, _, pointwise, output_norm, _ = self
        window = (depthwise.stride[0], depthwise.padding[0])
        if norm.training or output_norm.training:
            x = ops.depthwise_conv2d(x, depthwise.weight, depthwise.bias, *window)
            for layer in list(self)[1:]:
                x = layer(x)
            return x
        weight, bias = folded(depthwise, norm)
        output_weight, output_bias = folded(pointwise, output_norm)
        return ops.separable_conv2d(
            x, weight, output_weight, bias, output_bias, *window, self.activation, self.activation
        )


def folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of one convolution equal to `convolution` followed by `norm` in evaluation mode."""
    dtype = torch.promote_types(convolution.weight.dtype, torch.float32)
    scale = norm.weight.to(dtype) * torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    weight = convolution.weight.to(dtype) * scale[:, None, None, None]
    bias = 0 if convolution.bias is None else convolution.bias.to(dtype)
    bias = (bias - norm.running_mean.to(dtype)) * scale + norm.bias.to(dtype)
    return weight.to(convolution.weight.dtype), bias.to(convolution.weight.dtype)
