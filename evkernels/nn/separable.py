"""Depthwise-separable convolutions as modules: the bare pair, and the normalised block of event encoders."""

from functools import partial

import torch
from torch import Tensor, nn

from evkernels import ops
from evkernels.ops.conv_3x3 import projected

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
    """Depthwise convolution, norm, activation, 1 x 1 convolution, norm, activation, and a residual connection.

    Equivalent to::

        nn.Sequential(
            nn.Conv2d(C, C, k, stride, k // 2, groups=C), nn.BatchNorm2d(C), activation,
            nn.Conv2d(C, O, 1), nn.BatchNorm2d(O), activation,
        )

    and it is that Sequential, with its state-dict keys 0, 1, 3 and 4 (a block of the EfficientConvLSTM encoder). While
    both batch norms are in evaluation mode their current statistics are folded into the weights at every call and the
    block is one op; gradients flow through the fold. While both are in training mode, and with group norms always, it
    is `evkernels.ops.separable_norm_conv2d` for inputs in channels_last, which keeps the input and the pointwise result
    alone for the gradient; running statistics are those of nn.BatchNorm2d. For contiguous inputs, and with one norm
    frozen, only the depthwise convolution is fused.

    Args:
        in_channels: C of the input [N, C, H, W].
        out_channels: O of the output [N, O, H', W'].
        kernel_size: k, odd and at most 31; the padding is k // 2.
        stride: 1 or 2.
        activation: "none", "relu", "silu", "gelu" (exact, with erf), "gelu_tanh" or "sigmoid", in both places.
        groups: 0 for batch norms; else both are nn.GroupNorm(groups, channels).
        residual: Whether the input is added to the output; it needs C = O and stride 1.

    Raises:
        ValueError: if an option is not among those above.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        activation: str = "gelu",
        groups: int = 0,
        residual: bool = False,
    ):
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(_ACTIVATIONS)}, got {activation!r}")
        if residual and (in_channels != out_channels or stride != 1):
            raise ValueError(f"residual needs as many outputs as inputs and stride 1, got {out_channels} and {stride}")
        super().__init__(
            nn.Conv2d(in_channels, in_channels, kernel_size, stride, kernel_size // 2, groups=in_channels),
            nn.GroupNorm(groups, in_channels) if groups else nn.BatchNorm2d(in_channels),
            _ACTIVATIONS[activation](),
            nn.Conv2d(in_channels, out_channels, 1),
            nn.GroupNorm(groups, out_channels) if groups else nn.BatchNorm2d(out_channels),
            _ACTIVATIONS[activation](),
        )
        self.activation = activation
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Input [N, C, H, W] to output [N, O, H', W']."""
        depthwise, norm, _, pointwise, output_norm, _ = self
        activations = (self.activation, self.activation)
        if pays(x) and all(has_own_statistics(layer) for layer in (norm, output_norm)):
            residual = x if self.residual else None
            return normalized(x, depthwise, norm, pointwise, output_norm, activations, residual)
        window = (depthwise.stride[0], depthwise.padding[0])
        if has_live_statistics(norm) or has_live_statistics(output_norm):
            y = ops.depthwise_conv2d(x, depthwise.weight, depthwise.bias, *window)
            for layer in list(self)[1:]:
                y = layer(y)
        else:
            weight, bias = folded(depthwise, norm)
            output_weight, output_bias = folded(pointwise, output_norm)
            y = ops.separable_conv2d(x, weight, output_weight, bias, output_bias, *window, *activations)
        return y + x if self.residual else y


def has_live_statistics(norm: nn.Module) -> bool:
    """Does the norm compute statistics of its input, rather than use those it has?"""
    return isinstance(norm, nn.GroupNorm) or norm.training


def has_own_statistics(norm: nn.Module) -> bool:
    """Are the norm's statistics live and of its input alone? Not so of batch norms that several processes share."""
    return has_live_statistics(norm) and type(norm) in (nn.BatchNorm2d, nn.GroupNorm)


def pays(x: Tensor) -> bool:
    """Whether `normalized` is faster than the layers one by one: the op works in channels_last. Contiguous inputs are
    copied, with which training was 0.7 to 0.9 times as fast as PyTorch's own layers (16 to 64 channels, one thread); in
    channels_last it is up to 1.4 times as fast.
    """
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def normalized(
    x: Tensor,
    depthwise: nn.Conv2d,
    norm: nn.Module,
    pointwise: nn.Conv2d,
    output_norm: nn.Module,
    activations: tuple[str, str],
    residual: Tensor | None = None,
) -> Tensor:
    """The six layers of a SeparableBlock as one op, with what batch norms do to their buffers in training mode."""
    weights = (depthwise.weight, pointwise.weight, depthwise.bias, pointwise.bias)
    norms = (norm, output_norm)
    affine = (value for layer in norms for value in (layer.weight, layer.bias))
    groups = (getattr(layer, "num_groups", 0) for layer in norms)
    options = (depthwise.stride[0], depthwise.padding[0], *activations, *groups, norm.eps, output_norm.eps)
    y, *statistics = ops.separable_norm_conv2d(x, *weights, *affine, residual, *options)
    for layer, (mean, variance) in zip(norms, statistics, strict=True):
        _update(layer, mean[0], variance[0], y)
    return y


def activated(x: Tensor, norm: nn.BatchNorm2d, activation: str, projection: Tensor | None = None) -> Tensor:
    """activation(norm(x)), and the sum over its channels times `projection` [C] if that is given, [N, 1, H, W]; in
    channels_last one op, if the norm computes statistics.
    """
    if not (pays(x) and has_own_statistics(norm) and norm.affine):
        y = _ACTIVATIONS[activation]()(norm(x))
        return y if projection is None else projected(y, projection)
    y, statistics = ops.batch_norm_activation(x, norm.weight, norm.bias, projection, activation, norm.eps)
    _update(norm, *statistics, y)
    return y


@torch.no_grad()
def _update(norm: nn.Module, mean: Tensor, variance: Tensor, y: Tensor) -> None:
    """What a norm in training mode does to its buffers, after an output of the size of `y`; nothing if it has none."""
    if not isinstance(norm, nn.BatchNorm2d) or not norm.track_running_stats:
        return
    count = y.shape[0] * y.shape[2] * y.shape[3]
    norm.num_batches_tracked.add_(1)
    share = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
    for running, value in ((norm.running_mean, mean), (norm.running_var, variance * (count / (count - 1)))):
        running.copy_((1 - share) * running + share * value)


def folded(convolution: nn.Conv2d | nn.ConvTranspose2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of one convolution equal to `convolution` followed by `norm` in evaluation mode."""
    dtype = torch.promote_types(convolution.weight.dtype, torch.float32)
    scale = norm.weight.to(dtype) * torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    outputs = (1, -1, 1, 1) if isinstance(convolution, nn.ConvTranspose2d) else (-1, 1, 1, 1)
    weight = convolution.weight.to(dtype) * scale.view(outputs)
    bias = 0 if convolution.bias is None else convolution.bias.to(dtype)
    bias = (bias - norm.running_mean.to(dtype)) * scale + norm.bias.to(dtype)
    return weight.to(convolution.weight.dtype), bias.to(convolution.weight.dtype)
