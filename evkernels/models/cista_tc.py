"""CISTA-TC: images from events as sparse codes, found by an unrolled iteration and decoded by a ConvLSTM.

Convolutions and soft thresholds are PyTorch's; the ConvLSTM's gates are `ops.lstm_gates`. Every convolution reflects
the borders, which in PyTorch costs a padded copy of its input.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from evkernels.models.e2vid_layers import ConvLayer, GatesConvLSTM, RecurrentLayer, UpsampleConvLayer, check_grid

State = tuple[Tensor, Tensor, tuple[Tensor, Tensor]]


class CistaTC(nn.Module):
    """Voxel grids of events to images, one after the other.

    Equivalent to::

        x = W0(torch.cat([We(grid), Wi(image)], dim=1))
        z, z_before = P0(x), z
        for alpha_k, block in zip(alpha, lista_blocks):
            similar = (one_conv_for_prev(z_before) * one_conv_for_cur(z)).sigmoid()
            step = block.P(x - block.D(z)) + z + similar * (z_before - z) * alpha_k
            z = (step - block.Lambda).relu() - (-step - block.Lambda).relu()
        h, c = conv_lstm(Dg(z).relu(), (h, c))
        image = final_conv(upsamp_conv(F.interpolate(h, scale_factor=2, mode="bilinear"))).sigmoid()

    Args:
        base_channels: Channels of the ConvLSTM; the code has twice as many, both at half the size.
        depth: Iterations; all of them have the same weights.
        num_bins: Time bins of the voxel grid.

    Forward: (grid [N, num_bins, H, W] with even H and W of at least 4, normalised as E2VID's; state: None to begin,
    else what the call before returned) to (image [N, 1, H, W] in 0..1, state). The state is (image, z, (h, c)): the
    image [N, 1, H, W] detached, z [N, 2*base_channels, H/2, W/2] and the ConvLSTM's states, which stay in the autograd
    graph.

    Raises:
        ValueError: if `grid` has another shape; the message says what to pad to.

    State-dict keys are those of the published checkpoint, in which the weights of the iterations are repeated `depth`
    times; 669,251 parameters. Source: Liu and Dragotti, Sensing diversity and sparsity models for event generation and
    video reconstruction from events, TPAMI 2023.
    """

    size_multiple = 2

    def __init__(self, base_channels: int = 64, depth: int = 5, num_bins: int = 5):
        super().__init__()
        self.num_bins = num_bins
        channels, codes = base_channels, 2 * base_channels
        self.one_conv_for_prev = _reflected(codes, 1)
        self.one_conv_for_cur = _reflected(codes, 1)
        self.alpha = nn.ParameterList([nn.Parameter(0.001 * torch.rand(1, codes, 1, 1))] * depth)
        self.We = _reflected(num_bins, channels // 2)
        self.Wi = _reflected(1, channels // 2)
        self.W0 = _reflected(channels, channels, stride=2)
        self.P0 = _reflected(channels, codes)
        self.lista_blocks = nn.ModuleList([_IstaBlock(channels)] * depth)
        self.Dg = RecurrentLayer(
            _reflected(codes, channels, activation="relu"), GatesConvLSTM(channels, channels, padding_mode="reflect")
        )
        self.upsamp_conv = UpsampleConvLayer(channels, channels, 3, activation=None, padding_mode="reflect")
        self.final_conv = _reflected(channels, 1)

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Tensor]) -> "CistaTC":
        """A network of the sizes and with the weights of a checkpoint's `state_dict`.

        Raises:
            KeyError, RuntimeError: if it is not that of a CistaTC.
            ValueError: if its iterations differ in their weights.
        """
        depth = sum(name.endswith(".Lambda") for name in state_dict)
        for name, value in state_dict.items():
            group, _, rest = name.partition(".")
            if group in ("alpha", "lista_blocks"):
                first = f"{group}.0{rest[len(rest.partition('.')[0]) :]}"
                if not torch.equal(value, state_dict[first]):
                    raise ValueError(f"{name} must equal {first}: all iterations have the same weights")
        model = cls(state_dict["W0.conv2d.weight"].shape[0], depth, state_dict["We.conv2d.weight"].shape[1])
        model.load_state_dict(state_dict)
        return model

    def forward(self, grid: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        check_grid(grid, self.num_bins, self.size_multiple)
        if min(grid.shape[2:]) < 4:
            raise ValueError(f"grid must be at least 4x4, or its borders cannot be reflected, got {tuple(grid.shape)}")
        image, z_before, lstm_state = (None, None, None) if state is None else state
        image = torch.zeros_like(grid[:, :1]) if image is None else image
        x = self.W0(torch.cat([self.We(grid), self.Wi(image)], dim=1))
        z = self.P0(x)
        z_before = torch.zeros_like(z) if z_before is None else z_before
        before = self.one_conv_for_prev(z_before)
        for alpha, block in zip(self.alpha, self.lista_blocks, strict=True):
            similar = torch.sigmoid(before * self.one_conv_for_cur(z))
            z = block(x, z, similar * ((z_before - z) * alpha))
        h, lstm_state = self.Dg(z, lstm_state)
        image = self.final_conv(self.upsamp_conv(h)).sigmoid()
        return image, (image.detach(), z, lstm_state)


class _IstaBlock(nn.Module):
    """One iteration: a step against the residual of x, then a soft threshold that is learned for each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.D = _reflected(2 * channels, channels)
        self.P = _reflected(channels, 2 * channels)
        self.Lambda = nn.Parameter(0.001 * torch.rand(1, 2 * channels, 1, 1))

    def forward(self, x: Tensor, z: Tensor, temporal: Tensor) -> Tensor:
        step = self.P(x - self.D(z)) + z + temporal
        return torch.relu(step - self.Lambda) - torch.relu(-step - self.Lambda)


def _reflected(in_channels: int, out_channels: int, stride: int = 1, activation: str | None = None) -> ConvLayer:
    return ConvLayer(in_channels, out_channels, 3, stride, activation, padding_mode="reflect")
