"""Channel attention of the EfficientConvLSTM encoder."""

from torch import Tensor, nn

from evkernels import ops
from evkernels.nn.cell_options import is_plain
from evkernels.nn.separable import pays


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

    Input and output are [N, channels, H, W] in one dtype. With gradients and in channels_last computed by
    `evkernels.ops.channel_attention`, otherwise by PyTorch: without gradients it moves no more memory. State-dict keys
    `fc.0.weight` and `fc.2.weight` are those of the original. Source: EfficientConvLSTM, ChannelAttention (after SENet,
    arXiv:1709.01507, with GELU).
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
        reduce, _, expand = self.fc
        if x.requires_grad and pays(x) and is_plain(reduce) and is_plain(expand):
            return ops.channel_attention(x, reduce.weight, expand.weight)
        return x * self.scale(x)

    def scale(self, x: Tensor) -> Tensor:
        """The weights [N, channels, 1, 1] of the channels of `x`."""
        return self.fc(x.mean(dim=(2, 3), keepdim=True)).sigmoid()
