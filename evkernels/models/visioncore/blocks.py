"""VisionCore's blocks: convolution, norm, activation, dropout and pooling in one module, and a residual around it.

Depthwise convolutions are `evkernels.nn`'s, pooling is its AABlur_SE_SoftPool; the rest is torch.nn.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _triple
from torch.nn.utils.parametrizations import weight_norm

from evkernels.nn import AABlur_SE_SoftPool, CausalDepthwiseConv3d, DepthwiseConv2d, RMSNorm
from evkernels.nn.cell_options import check_choice


class ConvBlock(nn.Module):
    """Convolution, norm, activation, dropout and pooling, in the order asked for.

    Equivalent to::

        for name in order:
            x = components[name](x)

    with a causal convolution over frames: the input is padded by replication, in the plane as `padding` says and in
    time by (kernel - 1) * dilation frames before the first.

    Args:
        dim: 2 for [N, C, H, W], 3 for [N, C, T, H, W].
        in_channels, out_channels: Of the convolution.
        conv_params: kernel_size; optionally type ("standard", or "depthwise" with a 1x1 behind it), stride, padding,
            dilation, bias, each size an int or one per dimension. padding may be for the plane alone; in a causal block
            its entry for time has no effect. Without `bias` there is one if there is no norm.
        norm_type: "batch", "instance", "group", "rms" or None.
        norm_params: eps (1e-5), affine (False for "instance", else True), num_groups (1); target_dim (1) of "rms".
        act_type: "relu", "leakyrelu", "gelu", "silu" or "swish", "mish", "splitrelu" (doubles the channels),
            "bsoftplus" or None.
        act_params: Arguments of the activation.
        pool_params: type "aablur" (with stride, r, use_soft, temperature), "max" or "avg" (with torch's arguments), or
            None.
        dropout: Probability.
        use_weight_norm: Weights are g * v / |v|, |v| over all dimensions but the first; also of depthwise convolutions.
        causal: Whether a convolution over frames sees no later ones.
        order: Names of the components.

    Raises:
        ValueError: if a choice is unknown.

    State-dict keys are the original's: `components.conv.conv.weight`, or `components.conv.depthwise.weight` and
    `components.conv.pointwise.{weight,bias}`, `components.norm.*`, `components.pool.*`; with weight norm `weight` is
    `parametrizations.weight.original0` (g) and `original1` (v). In the original weight norm raises.
    Source: VisionCore, ConvBlock.
    """

    def __init__(
        self,
        dim: int,
        in_channels: int,
        out_channels: int,
        conv_params: Mapping,
        norm_type: str | None = "batch",
        norm_params: Mapping | None = None,
        act_type: str | None = "relu",
        act_params: Mapping | None = None,
        pool_params: Mapping | None = None,
        dropout: float = 0.0,
        use_weight_norm: bool = False,
        causal: bool = True,
        order: Sequence[str] = ("conv", "norm", "act", "dropout", "pool"),
    ) -> None:
        super().__init__()
        if dim not in (2, 3):
            raise ValueError(f"dim must be 2 or 3, got {dim}")
        norm_type, act_type = (None if name in (None, "none") else name.lower() for name in (norm_type, act_type))
        options = {"bias": norm_type is None, **conv_params}
        kind = options.pop("type", "standard")
        check_choice("conv_params.type", kind, _CONVOLUTIONS)
        conv = _CONVOLUTIONS[kind](dim, in_channels, out_channels, causal=causal and dim == 3, **options)
        if use_weight_norm:
            for layer in conv.children():
                weight_norm(layer)
        self.act_type = act_type
        self.order = tuple(order)
        self.output_channels = out_channels * (2 if act_type == "splitrelu" else 1)
        self.components = nn.ModuleDict(
            {
                "conv": conv,
                "norm": norm_layer(norm_type, out_channels, dim, **(norm_params or {})),
                "act": activation_layer(act_type, **(act_params or {})),
                "dropout": nn.Dropout(dropout) if dropout > 0 else nn.Identity(),
                "pool": _pooling_layer(dim, out_channels, **(pool_params or {})),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = self.components[name](x)
        return x


class ResBlock(nn.Module):
    """A block and a way around it, added.

    Equivalent to::

        y = post_add_activation(crop(main_block(x)) + crop(shortcut(x)))

    where both are cropped to the smaller of their sizes: to the last frames, and to the middle of the plane. If the
    shortcut has fewer channels than the block it gets zeros, otherwise those in excess are left out.

    Source: VisionCore, ResBlock.
    """

    def __init__(
        self, main_block: nn.Module, shortcut: nn.Module, post_add_activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.main_block = main_block
        self.shortcut = shortcut
        self.post_add_activation = nn.Identity() if post_add_activation is None else post_add_activation

    @property
    def output_channels(self) -> int:
        return self.main_block.output_channels

    def forward(self, x: Tensor) -> Tensor:
        main, around = self.main_block(x), self.shortcut(x)
        sizes = [min(a, b) for a, b in zip(main.shape[2:], around.shape[2:], strict=True)]
        main, around = _cropped(main, sizes), _cropped(around, sizes)
        missing = main.shape[1] - around.shape[1]
        # A negative number of zeros takes channels away.
        around = F.pad(around, (0, 0) * len(sizes) + (0, missing)) if missing else around
        return self.post_add_activation(main + around)


def _cropped(x: Tensor, sizes: Sequence[int]) -> Tensor:
    *frames, height, width = sizes
    if frames:
        x = x.narrow(2, x.shape[2] - frames[0], frames[0])
    for dim, size in ((-2, height), (-1, width)):
        x = x.narrow(dim, (x.shape[dim] - size) // 2, size)
    return x


class _StandardConv(nn.Module):
    def __init__(self, dim, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, *, causal, bias):
        super().__init__()
        options = {"stride": _sizes(stride), "dilation": _sizes(dilation), "bias": bias}
        self.border = _border(kernel_size, padding, dilation) if causal else None
        if not causal:
            options |= {"padding": _sizes(padding), "padding_mode": "replicate"}
        self.conv = _convolution(dim)(in_channels, out_channels, _sizes(kernel_size), **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.border is None else F.pad(x, self.border, mode="replicate"))


class _DepthwiseConv(nn.Module):
    def __init__(self, dim, in_channels, out_channels, kernel_size, stride=1, padding=0, dilation=1, *, causal, bias):
        super().__init__()
        if causal:
            (width, _, height, *_) = _border(kernel_size, padding, dilation)
            sizes = (_sizes(value) for value in (kernel_size, stride))
            self.depthwise = CausalDepthwiseConv3d(
                in_channels, *sizes, padding=(height, width), dilation=_sizes(dilation), bias=False
            )
        elif dim == 2 and all(isinstance(value, int) for value in (kernel_size, stride, padding, dilation)):
            self.depthwise = DepthwiseConv2d(
                in_channels, kernel_size, stride, padding, dilation, padding_mode="replicate", bias=False
            )
        else:
            sizes = [_sizes(value) for value in (kernel_size, stride, padding, dilation)]
            self.depthwise = _convolution(dim)(
                in_channels, in_channels, *sizes, groups=in_channels, bias=False, padding_mode="replicate"
            )
        self.pointwise = _convolution(dim)(in_channels, out_channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


_CONVOLUTIONS = {"standard": _StandardConv, "depthwise": _DepthwiseConv}


def _convolution(dim: int) -> type[nn.Module]:
    return nn.Conv2d if dim == 2 else nn.Conv3d


def _sizes(value):
    """An int, or a tuple for torch from a list of YAML."""
    return value if isinstance(value, int) else tuple(value)


def _border(kernel_size, padding, dilation) -> tuple[int, ...]:
    """What a causal convolution needs around its input, for F.pad; nothing where the kernel's size is 1."""
    kernel_size, dilation = _triple(_sizes(kernel_size)), _triple(_sizes(dilation))
    height, width = (padding, padding) if isinstance(padding, int) else tuple(padding)[-2:]
    height, width = (size if k > 1 else 0 for size, k in zip((height, width), kernel_size[1:], strict=True))
    return width, width, height, height, (kernel_size[0] - 1) * dilation[0], 0


def norm_layer(
    name: str | None,
    channels: int,
    dim: int,
    *,
    eps: float = 1e-5,
    affine: bool | None = None,
    num_groups: int = 1,
    target_dim: int | Sequence[int] = 1,
) -> nn.Module:
    """The norm that a configuration names."""
    affine = name != "instance" if affine is None else affine
    kinds = {
        None: nn.Identity,
        "batch": lambda: (nn.BatchNorm2d if dim == 2 else nn.BatchNorm3d)(channels, eps, affine=affine),
        "instance": lambda: (nn.InstanceNorm2d if dim == 2 else nn.InstanceNorm3d)(channels, eps, affine=affine),
        "group": lambda: nn.GroupNorm(num_groups, channels, eps, affine),
        "rms": lambda: RMSNorm(channels, (target_dim,) if isinstance(target_dim, int) else (*target_dim,), eps, affine),
    }
    check_choice("norm_type", name, kinds)
    return kinds[name]()


def activation_layer(name: str | None, **arguments) -> nn.Module:
    """The activation that a configuration names."""
    kinds = {
        None: nn.Identity,
        "none": nn.Identity,
        "relu": nn.ReLU,
        "leakyrelu": nn.LeakyReLU,
        "gelu": nn.GELU,
        "silu": nn.SiLU,
        "swish": nn.SiLU,
        "mish": nn.Mish,
        "splitrelu": _SplitReLU,
        "bsoftplus": _BSoftplus,
    }
    check_choice("act_type", name, kinds)
    return kinds[name](**arguments)


def _pooling_layer(dim: int, channels: int, *, type: str | None = None, **options) -> nn.Module:
    kinds = {
        None: nn.Identity,
        "none": nn.Identity,
        "aablur": lambda **others: AABlur_SE_SoftPool(channels, **others),
        "max": nn.MaxPool2d if dim == 2 else nn.MaxPool3d,
        "avg": nn.AvgPool2d if dim == 2 else nn.AvgPool3d,
    }
    check_choice("pool_params.type", type, kinds)
    if type == "aablur" and dim == 2:
        raise ValueError("pool_params.type 'aablur' needs dim = 3")
    return kinds[type](**options)


class _SplitReLU(nn.Module):
    """Positive and negative parts side by side, the former times a gain."""

    def __init__(self, trainable_gain: bool = False):
        super().__init__()
        self.ongain = nn.Parameter(torch.ones(1), requires_grad=trainable_gain)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.relu() * self.ongain.abs(), (-x).relu()], dim=1)


class _BSoftplus(nn.Module):
    """softplus(b * x) / b with a learned b between `beta_min` and `beta_max`."""

    def __init__(self, beta_init: float = 5.0, beta_min: float = 0.1, beta_max: float = 10.0):
        super().__init__()
        self.log_beta = nn.Parameter(torch.tensor(float(beta_init)).log())
        self.beta_min, self.beta_max = beta_min, beta_max

    def forward(self, x: Tensor) -> Tensor:
        beta = self.log_beta.exp().clamp(self.beta_min, self.beta_max)
        return F.softplus(beta * x) / beta
