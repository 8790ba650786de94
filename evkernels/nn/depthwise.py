"""Depthwise convolutions as modules: in the plane, and in time and the plane with a causal time axis.

Both are torch.nn convolutions by inheritance: whatever treats those specially (initialisation, counting, pruning) finds
them. Padding other than zeros is materialised by F.pad, one pass more over the input: rows outside of the image could
be pointers to rows inside, but columns would have to be gathered in the loops of every layout and gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.utils import _triple

from evkernels import ops
from evkernels.ops import registration
from evkernels.ops.depthwise_conv2d import check_activation

_PADDING_MODES = ("zeros", "reflect", "replicate")


class DepthwiseConv2d(nn.Conv2d):
    """One k x k filter per channel, and an activation.

    Equivalent to::

        activation(nn.Conv2d(C, C, k, stride, padding, dilation, groups=C, bias=bias, padding_mode=padding_mode)(x))

    and it is that Conv2d: `weight` [C, 1, k, k] and `bias` [C] have its names, shapes and initialisation.

    Args:
        channels: C of the input [N, C, H, W].
        kernel_size: k, odd and at most 31.
        stride: 1 or 2.
        padding: What is added at each border; None is (k - 1) * dilation // 2, which keeps the size at stride 1.
        dilation: Distance between the filter's taps, at least 1.
        padding_mode: "zeros", "reflect" or "replicate". Only zeros cost nothing: the others copy the padded input.
        bias: Whether there is one.
        activation: "none", "relu", "silu", "gelu" (exact, with erf), "gelu_tanh" or "sigmoid".

    Raises:
        ValueError: if an option is not among those above.

    Computed by `evkernels.ops.depthwise_conv2d`, which documents precision, layouts and gradients. On CUDA PyTorch's
    gradients of reflect and replicate padding are not deterministic.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        padding_mode: str = "zeros",
        bias: bool = True,
        activation: str = "none",
        device=None,
        dtype=None,
    ):
        check_activation("activation", activation)
        if kernel_size % 2 == 0 or not 1 <= kernel_size <= 31:
            raise ValueError(f"kernel_size must be odd and in [1, 31], got {kernel_size}")
        if stride not in (1, 2):
            raise ValueError(f"stride must be 1 or 2, got {stride!r}")
        if dilation < 1:
            raise ValueError(f"dilation must be at least 1, got {dilation}")
        if padding_mode not in _PADDING_MODES:
            raise ValueError(f"padding_mode must be one of {', '.join(_PADDING_MODES)}, got {padding_mode!r}")
        padding = (kernel_size - 1) * dilation // 2 if padding is None else padding
        if padding < 0:
            raise ValueError(f"padding must be at least 0, got {padding}")
        super().__init__(
            channels, channels, kernel_size, stride, padding, dilation, channels, bias, padding_mode, device, dtype
        )
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Input [N, C, H, W] to output [N, C, H', W']."""
        padding = self.padding[0]
        if self.padding_mode != "zeros" and padding:
            layout = registration.common_layout(x)
            x = F.pad(x, (padding,) * 4, self.padding_mode).contiguous(memory_format=layout)
            padding = 0
        return ops.depthwise_conv2d(
            x, self.weight, self.bias, self.stride[0], padding, self.activation, self.dilation[0]
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


class CausalDepthwiseConv3d(nn.Conv3d):
    """One filter per channel over frames and pixels, which sees no later frame; borders are replicated.

    Equivalent to::

        span_t = (kernel_size[0] - 1) * dilation[0]
        pad_h, pad_w = padding
        x = F.pad(x, (pad_w, pad_w, pad_h, pad_h, span_t, 0), mode="replicate")
        y = F.conv3d(x, weight, bias, stride, 0, dilation, groups=x.shape[1])

    Args:
        channels: C of the input [N, C, T, H, W].
        kernel_size: int or (time, height, width).
        stride: int or one for each of these.
        padding: int or (height, width) that is replicated at each border; None is (k - 1) * dilation // 2. In time the
            first frame stands for all before it, so that there are as many frames after as before at stride 1.
        dilation: int or (time, height, width).
        bias: Whether there is one.

    Raises:
        ValueError: if `padding` is negative or of another length.

    `weight` [C, 1, kt, kh, kw] and `bias` [C] are those of nn.Conv3d(C, C, kernel_size, groups=C). The frames go
    through `evkernels.ops.depthwise_conv2d` once per tap in time where a gradient is needed and the filter is square,
    with a stride of 1 or 2 in the plane: one CPU thread trains 2.5 to 5 times as fast as with F.conv3d (C = 16 to 128,
    3 x 3 and 5 x 5 in the plane). Otherwise F.conv3d computes, which is as fast or faster there. Differentiable to any
    order.
    Source: VisionCore, ConvBlock with causal=True.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        padding: int | tuple[int, int] | None = None,
        dilation: int | tuple[int, int, int] = 1,
        bias: bool = True,
        device=None,
        dtype=None,
    ):
        kernel_size, dilation = _triple(kernel_size), _triple(dilation)
        if padding is None:
            padding = tuple((k - 1) * d // 2 for k, d in zip(kernel_size[1:], dilation[1:], strict=True))
        elif isinstance(padding, int):
            padding = (padding, padding)
        if len(padding) != 2 or min(padding) < 0:
            raise ValueError(f"padding must be an int or (height, width), at least 0, got {padding!r}")
        super().__init__(
            channels, channels, kernel_size, stride, 0, dilation, channels, bias, device=device, dtype=dtype
        )
        self.border = tuple(padding)

    def forward(self, x: Tensor) -> Tensor:
        """Input [N, C, T, H, W] to output [N, C, T', H', W']."""
        (height, width), span = self.border, (self.kernel_size[0] - 1) * self.dilation[0]
        x = F.pad(x, (width, width, height, height, span, 0), mode="replicate")
        if torch.is_grad_enabled() and self._is_square() and (x.requires_grad or self.weight.requires_grad):
            return self._by_frames(x, (x.shape[2] - span - 1) // self.stride[0] + 1)
        return super().forward(x)

    def _is_square(self) -> bool:
        (_, k, width), (_, stride, across), (_, dilation, wide) = self.kernel_size, self.stride, self.dilation
        return (k, stride, dilation) == (width, across, wide) and k % 2 == 1 and k <= 31 and stride <= 2

    def _by_frames(self, x: Tensor, frames: int) -> Tensor:
        # Time first, channels last: the frames that a tap in time meets are a view, which the gradient keeps.
        x = x.permute(2, 0, 3, 4, 1).contiguous()
        step, total = self.stride[0], None
        for tap in range(self.kernel_size[0]):
            first = tap * self.dilation[0]
            images = x[first : first + (frames - 1) * step + 1 : step].flatten(0, 1).permute(0, 3, 1, 2)
            bias = self.bias if tap == 0 else None
            part = ops.depthwise_conv2d(
                images, self.weight[:, :, tap], bias, self.stride[1], 0, "none", self.dilation[1]
            )
            # 16-bit types are added up in float32.
            wide = part.to(torch.promote_types(part.dtype, torch.float32))
            total = wide if total is None else total + wide
        return total.to(part.dtype).unflatten(0, (frames, -1)).permute(1, 2, 0, 3, 4)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, border={self.border}"
