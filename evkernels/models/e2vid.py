"""E2VID: images from events by a U-Net whose encoders are recurrent.

Convolutions stay with PyTorch's library; the gates of the three or four ConvLSTMs are `ops.lstm_gates`.
"""

from collections.abc import Mapping
from itertools import pairwise

from torch import Tensor, nn

from evkernels.models.e2vid_layers import (
    ConvLayer,
    GatesConvLSTM,
    RecurrentLayer,
    ResidualBlock,
    TransposedConvLayer,
    UpsampleConvLayer,
    check_grid,
)

State = list[tuple[Tensor, Tensor]]


class E2VIDRecurrent(nn.Module):
    """Voxel grids of events to images, one after the other.

    Equivalent to::

        head = x = conv(grid).relu()
        for k, (conv, conv_lstm) in enumerate(encoders):
            x, c = state[k] = conv_lstm(conv(x).relu(), state[k])
        for block in residual_blocks:
            x = block(x)
        for decoder, (skip, c) in zip(decoders, reversed(state)):
            x = decoder(x + skip).relu()
        image = pred(x + head).sigmoid()

    Args:
        num_bins: Time bins of the voxel grid.
        num_encoders: Encoders, each of which halves the size and doubles the channels.
        base_num_channels: Channels before the first encoder.
        num_residual_blocks: Residual blocks between the last encoder and the first decoder.
        norm: "BN" for batch normalisation after all convolutions but the first and those of the ConvLSTMs, or None.
        use_upsample_conv: Decoders interpolate before a convolution (True) or have a transposed one (False).

    Forward: (grid [N, num_bins, H, W] with H and W multiples of 2**num_encoders, normalised as E2VID's; state: None to
    begin, else what the call before returned) to (image [N, 1, H, W] in 0..1, state). The state is a list of one (h, c)
    per encoder and stays in the autograd graph: detach it to truncate the gradient.

    Raises:
        ValueError: if `grid` has another shape (the message says what to pad to), or `norm` is unknown.

    Defaults and state-dict keys, `unetrecurrent.head.conv2d.weight` and so on, are those of the published code, in the
    form with ConvLSTMs and summed skips. The published E2VID_lightweight has 3 encoders, "BN" and transposed
    convolutions: 74 tensors, 10,712,098 parameters.
    Source: Rebecq et al., High speed and high dynamic range video with an event camera, TPAMI 2019 (arXiv:1906.07165).
    """

    def __init__(
        self,
        num_bins: int = 5,
        num_encoders: int = 4,
        base_num_channels: int = 32,
        num_residual_blocks: int = 2,
        norm: str | None = None,
        use_upsample_conv: bool = True,
    ):
        super().__init__()
        self.num_bins = num_bins
        self.size_multiple = 2**num_encoders
        sizes = [base_num_channels * 2**level for level in range(num_encoders + 1)]
        decoder = UpsampleConvLayer if use_upsample_conv else TransposedConvLayer
        self.unetrecurrent = nn.ModuleDict(
            {
                "head": ConvLayer(num_bins, sizes[0], 5),
                "encoders": nn.ModuleList(
                    RecurrentLayer(ConvLayer(fine, coarse, 5, stride=2, norm=norm), GatesConvLSTM(coarse, coarse))
                    for fine, coarse in pairwise(sizes)
                ),
                "resblocks": nn.ModuleList(ResidualBlock(sizes[-1], norm) for _ in range(num_residual_blocks)),
                "decoders": nn.ModuleList(
                    decoder(coarse, fine, 5, norm=norm) for coarse, fine in pairwise(reversed(sizes))
                ),
                "pred": ConvLayer(sizes[0], 1, 1, activation=None, norm=norm),
            }
        )

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> "E2VIDRecurrent":
        """A network of the form and with the weights of a checkpoint's `state_dict`; names and shapes tell the form.

        Raises:
            KeyError, RuntimeError: if it is not that of an E2VIDRecurrent.
        """
        prefix = "unetrecurrent."
        channels, bins = state_dict[f"{prefix}head.conv2d.weight"].shape[:2]
        names = [name.removeprefix(prefix).split(".") for name in state_dict if name.startswith(prefix)]
        model = cls(
            bins,
            len({name[1] for name in names if name[0] == "encoders"}),
            channels,
            len({name[1] for name in names if name[0] == "resblocks"}),
            norm="BN" if f"{prefix}pred.norm_layer.weight" in state_dict else None,
            use_upsample_conv=f"{prefix}decoders.0.conv2d.weight" in state_dict,
        )
        model.load_state_dict(state_dict)
        return model

    def forward(self, grid: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        check_grid(grid, self.num_bins, self.size_multiple)
        net = self.unetrecurrent
        head = x = net["head"](grid)
        before = [None] * len(net["encoders"]) if state is None else state
        state = []
        for encoder, kept in zip(net["encoders"], before, strict=True):
            x, kept = encoder(x, kept)
            state.append(kept)
        for block in net["resblocks"]:
            x = block(x)
        for decoder, (skip, _) in zip(net["decoders"], reversed(state), strict=True):
            x = decoder(x + skip)
        return net["pred"](x + head).sigmoid(), state
