"""ConvGRU cell in both published forms: convolutions around `gru_reset` and `gru_update`, or one `gru_gates`.

Classic (E2VID, FireNet): r*h goes through the candidate's convolution, so a step has two rounds of convolutions. Those
of z and r stay separate: with their weights joined for one convolution, forward took 1.04 to 1.13 times as long,
training 0.8 to 1.08 times without a trend (16, 64, 256 channels at 90x160, 45x80, 23x40, float32, one thread).

Fast (VisionCore): r multiplies h after the convolution, so the input's convolution does not wait for the state and runs
over all frames of a sequence at once; a step has one convolution of h.
"""

import torch
from torch import Tensor, nn

from evkernels import ops
from evkernels.nn.recurrent import RecurrentCell


class ConvGRUCell(RecurrentCell):
    """Convolutional GRU cell.

    Equivalent to (form="classic")::

        xh = torch.cat([x, h], dim=1)
        z, r = update_gate(xh).sigmoid(), reset_gate(xh).sigmoid()
        n = out_gate(torch.cat([x, r * h], dim=1)).tanh()
        h_next = (1 - z) * h + z * n

    Equivalent to (form="fast")::

        z, r, n = (conv_x(x) + layer_norm(conv_h(h))).chunk(3, dim=1)
        n = (n + r.sigmoid() * h).tanh()
        h_next = (1 - z.sigmoid()) * h + z.sigmoid() * n

    Args:
        in_channels: Channels of x.
        hidden_channels: Channels of h.
        kernel_size: Odd side of the square kernels; height and width stay.
        form: "classic" (E2VID, FireNet) or "fast" (VisionCore).
        layer_norm: Fast form: GroupNorm of min(32, hidden_channels) groups on the state's convolution.
        depthwise: Fast form: each convolution of at least 3 channels is a depthwise one followed by a 1x1.
        groups: Fast form, not depthwise: groups of the convolutions, at most their input channels.

    Raises:
        ValueError: if `kernel_size` is even, `form` is unknown, an argument of the fast form comes with the classic
            one, 3*hidden_channels is not divisible by the norm's groups or the channels are not by `groups`.

    State dict: `update_gate`, `reset_gate`, `out_gate` (each `.weight` [hidden, in + hidden, k, k], x first, `.bias`),
    or `conv_x.{weight,bias}`, `conv_h.weight` with rows z, r, n, `layer_norm.{weight,bias}`; depthwise `conv_x.0`,
    `conv_x.1` and so on. Initialised as the originals: orthogonal weights and zero bias (classic), conv_x as
    torch.nn.Conv2d and conv_h orthogonal (fast). h is float32 under autocast. Source: Ballas et al. 2016
    (arXiv:1511.06432).
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int = 3,
        form: str = "classic",
        *,
        layer_norm: bool = True,
        depthwise: bool = False,
        groups: int = 1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(in_channels, hidden_channels, kernel_size)
        if form not in ("classic", "fast"):
            raise ValueError(f"form must be 'classic' or 'fast', got {form!r}")
        if form == "classic" and (not layer_norm or depthwise or groups != 1):
            raise ValueError("layer_norm, depthwise and groups belong to form='fast'")
        self.form = form
        where = {"device": device, "dtype": dtype}
        if form == "classic":
            # In this order, because an optimiser's saved state goes by the order of the parameters.
            for name in ("reset_gate", "update_gate", "out_gate"):
                channels = in_channels + hidden_channels
                gate = nn.Conv2d(channels, hidden_channels, kernel_size, padding=kernel_size // 2, **where)
                nn.init.orthogonal_(gate.weight)
                nn.init.zeros_(gate.bias)
                self.add_module(name, gate)
        else:
            rows = 3 * hidden_channels
            self.conv_x = _convolution(in_channels, rows, kernel_size, depthwise, groups, True, where)
            self.conv_h = _convolution(hidden_channels, rows, kernel_size, depthwise, groups, False, where)
            self.layer_norm = nn.GroupNorm(min(32, hidden_channels), rows, **where) if layer_norm else nn.Identity()
            for weight in self.conv_h.parameters():
                nn.init.orthogonal_(weight)

    def forward(self, x: Tensor, h: Tensor | None = None) -> Tensor:
        """One step, with the convention of torch.nn.GRUCell.

        Args:
            x: Input [N, in_channels, H, W].
            h: State [N, hidden_channels, H, W]; zeros if None. It may be float32 beside 16-bit inputs and then stays
                float32.

        Returns:
            h: the next state. Does not alias an input.

        Raises:
            ValueError: if shapes disagree.
        """
        self._check_input(x)
        h = self.initial_state(x) if h is None else h
        self._check_state("h", h, x)
        (frame,), step = self._sequence(x[None])
        return step(frame, h)[0]

    def initial_state(self, x: Tensor) -> Tensor:
        """Zero h for inputs like `x` [N, in_channels, H, W], in their dtype and layout."""
        return self._zeros(x)

    def _sequence(self, x):
        if self.form == "fast":
            return self.conv_x(x.flatten(0, 1)).unflatten(0, x.shape[:2]), self._fast_step
        return x, self._classic_step

    def _fast_step(self, x_gates, h):
        h_gates = self.layer_norm(self.conv_h(h.to(x_gates.dtype)))
        h = ops.gru_gates(x_gates, h_gates, h)
        return h, h

    def _classic_step(self, x, h):
        xh = torch.cat([x, h.to(x.dtype)], dim=1)
        z, rh = ops.gru_reset(torch.cat([self.update_gate(xh), self.reset_gate(xh)], dim=1), h)
        h = ops.gru_update(z, self.out_gate(torch.cat([x, rh], dim=1)), h)
        return h, h

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.hidden_channels}, form={self.form!r}"


def _convolution(channels, rows, kernel_size, depthwise, groups, bias, where) -> nn.Module:
    """VisionCore's rule: depthwise wins over groups, and both give way where there are too few channels."""
    padding = kernel_size // 2
    if depthwise and channels >= 3:
        spatial = nn.Conv2d(channels, channels, kernel_size, padding=padding, groups=channels, bias=False, **where)
        return nn.Sequential(spatial, nn.Conv2d(channels, rows, 1, bias=bias, **where))
    groups = min(groups, channels)
    return nn.Conv2d(channels, rows, kernel_size, padding=padding, groups=groups, bias=bias, **where)
