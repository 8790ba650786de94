"""VisionCore's pooling: blur, soft pooling and channel gate per frame.

Blur and soft pooling are `ops.blur_soft_pool2d`; the gate is plain PyTorch, on maps a quarter of the size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evkernels import ops


class AABlur_SE_SoftPool(nn.Module):
    """Binomial 3 x 3 blur, 2 x 2 soft pooling, and a gate per channel and frame from the pooled map's means.

    Equivalent to::

        y = F.conv2d(x, blur, padding=1)  # each channel and frame on its own
        weight = (y / temperature).exp()
        y = F.avg_pool2d(y * weight, 2, stride) / (F.avg_pool2d(weight, 2, stride) + 1e-6)
        y = y * se(y)

    with `se` = mean over each frame, 1 x 1 convolution to max(C // r, 1) channels, SiLU, 1 x 1 convolution back,
    sigmoid.

    Args:
        C: Channels of the input [N, C, T, H, W].
        stride: Of the 2 x 2 window.
        r: By how much the gate's network narrows in between, at least 1.
        use_soft: Otherwise the window's mean is taken.
        temperature: 1 is the published soft pooling, 10 that of its later version.

    Raises:
        ValueError: if the input is not [N, C, T, H, W] or smaller than the window.

    The soft pooling is computed in float32 (float64 for float64), with the window's largest value taken out of the
    exponentials: as written above they overflow in float16 from 9 on, in float32 from 85 on. State-dict keys `blur`
    [1, 1, 3, 3], `se.1.{weight,bias}` and `se.3.{weight,bias}` are those of the original. Differentiable to any order.
    Source: VisionCore, AABlur_SE_SoftPool; soft pooling after Stergiou et al. 2021 (arXiv:2101.00440).
    """

    def __init__(self, C: int, stride: int = 2, r: int = 8, use_soft: bool = True, temperature: float = 1.0):
        super().__init__()
        narrow = max(C // r, 1)
        self.channels, self.stride, self.use_soft, self.temperature = C, stride, use_soft, temperature
        line = torch.tensor([1.0, 2.0, 1.0])
        self.register_buffer("blur", (line[:, None] * line / 16).view(1, 1, 3, 3))
        self.se = nn.Sequential(
            nn.AdaptiveAvgPool3d((None, 1, 1)),
            nn.Conv3d(C, narrow, 1),
            nn.SiLU(),
            nn.Conv3d(narrow, C, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Input [N, C, T, H, W] to output [N, C, T, (H - 2) // stride + 1, (W - 2) // stride + 1]."""
        if x.dim() != 5 or x.shape[1] != self.channels or min(x.shape[3:]) < 2:
            raise ValueError(
                f"x must be [N, C, T, H, W] with C = {self.channels} and H, W at least 2, got {tuple(x.shape)}"
            )
        # Every channel of every frame is an image of its own.
        if self.use_soft:
            y = ops.blur_soft_pool2d(x.flatten(1, 2), self.stride, self.temperature)
        else:
            y = ops.depthwise_conv2d(x.flatten(0, 2)[:, None], self.blur.to(x.dtype))
            y = F.avg_pool2d(y, 2, self.stride)
        y = y.reshape(*x.shape[:3], *y.shape[2:])
        return y * self.se(y)

    def extra_repr(self) -> str:
        return f"{self.channels}, stride={self.stride}, use_soft={self.use_soft}, temperature={self.temperature}"
