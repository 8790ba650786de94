"""Channel attention of the EfficientConvLSTM encoder.

Plain PyTorch: the two 1 x 1 layers see one pixel per sample, and the product with `x` is a single pass over memory.
"""

from torch import Tensor, nn


class ChannelAttention(nn.Module):
    """Scales each channel by a weight between 0 and 1 that a small network forms from all channel means.

    Equivalent to::

        scale = fc(x.mean(dim=(2, 3), keepdim=True)).sigmoid()
        y = x * scale

    with `fc` = 1 x 1 convolution to max(channels // reduction, 1) channels, GELU, 1 x 1 convolution back, no biases.

    Args:
        channels: Channels of the input, at least 1.
        reduction: By how much the network narrows in between, at least 1.

    Raises:
        ValueError: if `channels` or `reduction` is smaller than 1.

    Input and output are [N, channels, H, W] in one dtype. State-dict keys `fc.0.weight` and `fc.2.weight` are those of
    the original. Source: EfficientConvLSTM, ChannelAttention (after SENet, arXiv:1709.01507, with GELU).
    """

    def __init__(self, channels: int, reduction: int = 8):
        super().__init__()
        for name, value in (("channels", channels), ("reduction", reduction)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        narrow = max(channels // reduction, 1)
        self.fc = nn.Sequential(
            nn.Conv2d(channels, narrow, 1, bias=False), nn.GELU(), nn.Conv2d(narrow, channels, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale(x)

    def scale(self, x: Tensor) -> Tensor:
        """The weights [N, channels, 1, 1] of the channels of `x`."""
        return self.fc(x.mean(dim=(2, 3), keepdim=True)).sigmoid()
