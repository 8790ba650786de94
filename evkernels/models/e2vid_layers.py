"""The parts that E2VID, FireNet and CISTA-TC share, with the names that their checkpoints give them.

Convolutions are PyTorch's, with our gradient of a 3x3 weight where its own is slow; in inference those of 3x3 are one
op with what follows them where that is faster, unless `evkernels.nn.set_winograd` forbids it. Elsewhere ReLU works in
the convolution's result, which nothing else reads and no gradient needs. The recurrent cells are those of
`evkernels.nn`.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from evkernels.nn import ConvLSTMCell
from evkernels.nn.convolution import activated_convolution, convolved


class ConvLayer(nn.Module):
    """A convolution that keeps or divides the size, then batch normalisation and ReLU if asked for.

    Equivalent to::

        x = conv2d(x)
        x = norm_layer(x)  # norm="BN"
        x = x.relu()  # activation="relu"

    Args:
        in_channels, out_channels: Channels of x and of the result.
        kernel_size: Odd side of the kernel; padded by half of it.
        stride: Divides the size, rounding up.
        activation: "relu" or None.
        norm: "BN" or None. With "BN" the convolution has no bias.
        padding_mode: As in torch.nn.Conv2d.

    State dict: `conv2d.weight`, `conv2d.bias` or `norm_layer.*`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        activation: str | None = "relu",
        norm: str | None = None,
        padding_mode: str = "zeros",
    ):
        super().__init__()
        self.activation = activation
        self.winograd = True
        self.conv2d = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=kernel_size // 2,
            bias=norm is None,
            padding_mode=padding_mode,
        )
        self.norm_layer = normalization(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_layer is None:
            return activated_convolution(self.conv2d, x, self.activation or "none", winograd=self.winograd)
        return self._activated(convolved(self.conv2d, x))

    def _activated(self, x: Tensor) -> Tensor:
        x = x if self.norm_layer is None else self.norm_layer(x)
        return F.relu(x, inplace=True) if self.activation == "relu" else x


class UpsampleConvLayer(ConvLayer):
    """Twice the size by bilinear interpolation, then a `ConvLayer`."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False))


class TransposedConvLayer(ConvLayer):
    """Twice the size by a transposed convolution, which takes the place of the `ConvLayer`'s own.

    State dict: `transposed_conv2d.weight` [in, out, k, k], `transposed_conv2d.bias` or `norm_layer.*`.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, norm: str | None = None):
        super().__init__(in_channels, out_channels, kernel_size, norm=norm)
        del self.conv2d
        self.transposed_conv2d = nn.ConvTranspose2d(
            in_channels, out_channels, kernel_size, 2, kernel_size // 2, output_padding=1, bias=norm is None
        )

    def forward(self, x: Tensor) -> Tensor:
        return self._activated(self.transposed_conv2d(x))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around which the input goes by.

    Equivalent to::

        y = bn1(conv1(x)).relu()
        x = (bn2(conv2(y)) + x).relu()

    Args:
        channels: Of x and the result.
        norm: "BN", or None: then `bn1` and `bn2` are absent and the convolutions have biases.
    """

    def __init__(self, channels: int, norm: str | None = None):
        super().__init__()
        self.winograd = True
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=norm is None)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=norm is None)
        self.bn1, self.bn2 = normalization(norm, channels), normalization(norm, channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.bn1 is None:
            y = activated_convolution(self.conv1, x, "relu", winograd=self.winograd)
            return activated_convolution(self.conv2, y, "relu", x, self.winograd)
        y = convolved(self.conv2, F.relu(self.bn1(convolved(self.conv1, x)), inplace=True))
        return F.relu(self.bn2(y) + x, inplace=True)


class GatesConvLSTM(ConvLSTMCell):
    """`ConvLSTMCell` under E2VID's names: `Gates.weight` [4*hidden, in + hidden, 3, 3], blocks i, f, o, g.

    Args:
        in_channels, hidden_channels: Channels of x and of the states.
        padding_mode: As in torch.nn.Conv2d.
    """

    def __init__(self, in_channels: int, hidden_channels: int, padding_mode: str = "zeros"):
        super().__init__(in_channels, hidden_channels, order="ifog", padding_mode=padding_mode)
        self.Gates = self._modules.pop("conv")

    @property
    def conv(self) -> nn.Conv2d:
        """The convolution under the name by which the base class calls it."""
        return self.Gates


class RecurrentLayer(nn.Module):
    """A layer and a recurrent cell after it.

    Args:
        conv: The layer, x to the cell's input.
        recurrent_block: The cell.

    Forward: (x, state or None) to (h, state).
    """

    def __init__(self, conv: nn.Module, recurrent_block: nn.Module):
        super().__init__()
        self.conv = conv
        self.recurrent_block = recurrent_block

    def forward(self, x: Tensor, state=None):
        state = self.recurrent_block(self.conv(x), state)
        return (state[0] if isinstance(state, tuple) else state), state


def normalization(norm: str | None, channels: int) -> nn.BatchNorm2d | None:
    """The layer of that name."""
    if norm not in ("BN", None):
        raise ValueError(f"norm must be 'BN' or None, got {norm!r}")
    return nn.BatchNorm2d(channels) if norm else None


def check_grid(grid: Tensor, bins: int, multiple: int = 1) -> None:
    """Raises ValueError unless `grid` is [N, bins, H, W] with H and W multiples of `multiple`."""
    if grid.dim() != 4 or grid.shape[1] != bins:
        raise ValueError(f"grid must be [N, bins, H, W] with bins = {bins}, got {tuple(grid.shape)}")
    height, width = grid.shape[2:]
    if height % multiple or width % multiple or not height or not width:
        up = [max(1, -(-size // multiple)) * multiple for size in (height, width)]
        raise ValueError(
            f"grid must have H and W that are multiples of {multiple}, got {height}x{width}: pad it to {up[0]}x{up[1]} "
            "and crop the image"
        )
