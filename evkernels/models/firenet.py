"""FireNet: images from events at full resolution, with two convolutional GRUs of 16 channels.

Over nine tenths of the arithmetic is in 3x3 convolutions. On the CPU all maps are channels_last: a GRU is one op with
Winograd's convolutions, `ops.conv_gru_3x3`, and so is, in inference, each convolution of a residual block with what
follows it. `evkernels.nn.set_winograd(model, False)` leaves the convolutions to PyTorch's library.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from evkernels.models.e2vid_layers import ConvLayer, RecurrentLayer, ResidualBlock, check_grid
from evkernels.nn import ConvGRUCell


class FireNet(nn.Module):
    """Voxel grids of events to images, one after the other.

    Equivalent to::

        h0 = convgru_0(conv(grid).relu(), h0)
        h1 = convgru_1(residual_block_0(h0), h1)
        image = pred(residual_block_1(h1))

    Args:
        num_bins: Time bins of the voxel grid.
        base_num_channels: Channels of every map and both states.

    Forward: (grid [N, num_bins, H, W], any H and W, normalised as E2VID's; state: None to begin, else what the call
    before returned) to (image [N, 1, H, W], state). The image is of linear intensity, about 0 to 1 but not bounded. The
    state (h0, h1), [N, base_num_channels, H, W] each, stays in the autograd graph: detach it to truncate the gradient.

    Raises:
        ValueError: if `grid` is not [N, num_bins, H, W] or the state does not belong to it.

    State-dict keys are those of the published checkpoint, `net.head.conv.conv2d.weight` and so on; 37,777 parameters.
    Source: Scheerlinck et al., Fast image reconstruction with an event camera, WACV 2020; the form without skips.
    """

    # H and W may be any.
    size_multiple = 1

    def __init__(self, num_bins: int = 5, base_num_channels: int = 16):
        super().__init__()
        self.num_bins = num_bins
        channels = base_num_channels
        self.net = nn.ModuleDict(
            {
                "head": RecurrentLayer(
                    ConvLayer(num_bins, channels, 3), ConvGRUCell(channels, channels, winograd=True)
                ),
                "resblocks": nn.ModuleList(
                    [
                        RecurrentLayer(ResidualBlock(channels), ConvGRUCell(channels, channels, winograd=True)),
                        ResidualBlock(channels),
                    ]
                ),
                "pred": ConvLayer(channels, 1, 1, activation=None),
            }
        )
        # The middle of the range of intensities.
        nn.init.constant_(self.net["pred"].conv2d.bias, 0.5)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> "FireNet":
        """A network of the sizes and with the weights of a checkpoint's `state_dict`.

        Raises:
            KeyError, RuntimeError: if it is not that of a FireNet.
        """
        channels, bins = state_dict["net.head.conv.conv2d.weight"].shape[:2]
        model = cls(bins, channels)
        model.load_state_dict(state_dict)
        return model

    def forward(self, grid: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        check_grid(grid, self.num_bins)
        h0, h1 = (None, None) if state is None else state
        if grid.device.type == "cpu":
            grid, h0, h1 = (
                None if value is None else value.contiguous(memory_format=torch.channels_last)
                for value in (grid, h0, h1)
            )
        recurrent, last = self.net["resblocks"]
        x, h0 = self.net["head"](grid, h0)
        x, h1 = recurrent(x, h1)
        return self.net["pred"](last(x)), (h0, h1)
