"""ConvGRU cell in both published forms: convolutions around `gru_reset` and `gru_update`, or one `gru_gates`.

Classic (E2VID, FireNet): r*h goes through the candidate's convolution, so a step has two rounds of convolutions. Those
of z and r run as one with their weights joined at every step, where the cell is small: of 16 channels at 180x240 and 64
at 60x80, inference took 0.83 to 0.95 of the time of two, training 0.90 to 1.0 (float32, one thread). At 256 channels
the copy of the weights costs up to a quarter of the step and they run one by one.

Fast (VisionCore): r multiplies h after the convolution, so the input's convolution does not wait for the state and runs
over all frames of a sequence at once; a step has one convolution of h. With a stride or dilation the classic form
convolves the inputs in the same way, by the columns of its weights that belong to x.

With `winograd`, where nothing but the convolutions and the gates acts on the state, a classic 3x3 cell is one op for
all steps: `ops.conv_gru_3x3`. Plain 3x3 convolutions of a fast cell are then Winograd's too, their weights transformed
once per call of the cell or the layer: what acts between the steps (norm, clamps, dropout) stays outside.
"""

import torch
from torch import Tensor, nn

from evkernels import ops
from evkernels.nn import cell_options
from evkernels.nn.convolution import convolved
from evkernels.nn.recurrent import RecurrentCell
from evkernels.ops import registration
from evkernels.ops.conv_3x3 import PackedConvolution

_MOST_JOINED_CHANNELS = 64
# With fewer the transforms cost more than they save.
_FEWEST_PACKED_CHANNELS = 32


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
        padding_mode: As in torch.nn.Conv2d.
        stride: Of the convolution of x: h is [N, hidden_channels, ceil(H / stride), ceil(W / stride)].
        dilation: Of the convolution of x; that of h has none.
        norm_groups: Classic form: if given, a GroupNorm of that many groups in the pre-activations of each gate and of
            the candidate; 1 is the layer norm of each over channels and pixels.
        zoneout: Probability with which an element of h keeps its previous value in training; its mean otherwise.
        recurrent_dropout: Probability to drop an element of the h that is convolved, in training; one mask for all
            steps of a sequence, and one per call of `forward`. The blend with n sees h whole.
        winograd: Whether a classic 3x3 cell without options runs, in float32, as `ops.conv_gru_3x3`, and plain 3x3
            convolutions of a fast one with at least 32 input channels by the same method on the CPU: faster, but
            Winograd's convolutions have about three times the rounding error of direct sums for weights of one size
            and ten times for FireNet's published ones, and a NaN or an infinity reaches up to two pixels. The weights
            of a fast cell are transformed once per sequence, and in every single step.

    Raises:
        ValueError: if `kernel_size` is even, `form` is unknown, an argument of the one form comes with the other,
            3*hidden_channels is not divisible by the norm's groups or the channels are not by `groups`, or an option
            is not among those above.

    State dict: `update_gate`, `reset_gate`, `out_gate` (each `.weight` [hidden, in + hidden, k, k], x first, `.bias`),
    with `norm_groups` also `norm_zr` and `norm_n`; or `conv_x.{weight,bias}`, `conv_h.weight` with rows z, r, n,
    `layer_norm.{weight,bias}`, depthwise `conv_x.0`, `conv_x.1` and so on. Initialised as the originals: orthogonal
    weights and zero bias (classic), conv_x as torch.nn.Conv2d and conv_h orthogonal (fast). h is float32 under
    autocast. Source: Ballas et al. 2016 (arXiv:1511.06432); zoneout Krueger et al. 2017 (arXiv:1606.01305), recurrent
    dropout Gal and Ghahramani 2016 (arXiv:1512.05287).
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
        padding_mode: str = "zeros",
        stride: int = 1,
        dilation: int = 1,
        norm_groups: int | None = None,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
        winograd: bool = False,
    ) -> None:
        super().__init__(
            in_channels,
            hidden_channels,
            kernel_size,
            stride=stride,
            dilation=dilation,
            zoneout=zoneout,
            recurrent_dropout=recurrent_dropout,
        )
        if form not in ("classic", "fast"):
            raise ValueError(f"form must be 'classic' or 'fast', got {form!r}")
        if form == "classic" and (not layer_norm or depthwise or groups != 1):
            raise ValueError("layer_norm, depthwise and groups belong to form='fast'")
        if form == "fast" and norm_groups is not None:
            raise ValueError("norm_groups belongs to form='classic'; form='fast' has layer_norm")
        self.form = form
        self.winograd = winograd
        where = {"device": device, "dtype": dtype}
        padding = {"padding": kernel_size // 2, "padding_mode": padding_mode}
        if form == "classic":
            # In this order, because an optimiser's saved state goes by the order of the parameters.
            for name in ("reset_gate", "update_gate", "out_gate"):
                channels = in_channels + hidden_channels
                gate = nn.Conv2d(channels, hidden_channels, kernel_size, **padding, **where)
                nn.init.orthogonal_(gate.weight)
                nn.init.zeros_(gate.bias)
                self.add_module(name, gate)
            for name, blocks in (("norm_zr", 2), ("norm_n", 1)):
                self.add_module(name, cell_options.gate_norm(blocks, norm_groups, hidden_channels, **where))
        else:
            rows = 3 * hidden_channels
            window = {"stride": stride, "dilation": dilation, "padding_mode": padding_mode}
            self.conv_x = _convolution(in_channels, rows, kernel_size, depthwise, groups, True, window, where)
            window = {"padding_mode": padding_mode}
            self.conv_h = _convolution(hidden_channels, rows, kernel_size, depthwise, groups, False, window, where)
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
        return self._single(x, h)

    def initial_state(self, x: Tensor) -> Tensor:
        """Zero h for inputs like `x` [N, in_channels, H, W], in their dtype and layout."""
        return self._zeros(x)

    def _run(self, x, state, reset, active):
        if active is not None or not self._is_one_op(x):
            return super()._run(x, state, reset, active)
        h = self.initial_state(x[0]) if state is None else state
        self._check_state("h", h, x[0])
        gates = (self.update_gate, self.reset_gate, self.out_gate)
        parameters = [value for gate in gates for value in (gate.weight, gate.bias)]
        output = ops.conv_gru_3x3(x, h, *parameters, reset)
        return output, output[-1]

    def _single(self, x, state):
        if not self._is_one_op(x):
            return super()._single(x, state)
        return self._run(x[None], state, None, None)[1]

    def _is_one_op(self, x: Tensor) -> bool:
        """Whether nothing but `ops.conv_gru_3x3` acts on the state, for inputs like `x`."""
        return (
            self.form == "classic"
            and self.winograd
            and self.kernel_size == 3
            and self.stride == self.dilation == 1
            and not (self.zoneout or (self.training and self.recurrent_dropout))
            and self.norm_zr is None
            and all(cell_options.is_plain(gate) for gate in (self.update_gate, self.reset_gate, self.out_gate))
            and self.out_gate.padding_mode == "zeros"
            and cell_options.is_wide(x)
        )

    @property
    def _convolves_input(self):
        return self.form == "fast" or super()._convolves_input

    def _step(self, mask):
        if self.form == "fast":
            advance = self._fast_step()
        else:
            advance = self._strided_step if self._convolves_input else self._classic_step

        def step(frame, h):
            h_next = advance(frame, h, h if mask is None else h * mask)
            h_next = cell_options.zoneout(h_next, h, self.zoneout, self.training)
            return h_next, h_next

        return step

    def _fast_step(self):
        convolve = PackedConvolution(self.conv_h.weight) if self._is_packed(self.conv_h) else self.conv_h

        def advance(x_gates, h, seen):
            return ops.gru_gates(x_gates, self.layer_norm(convolve(seen.to(x_gates.dtype))), h)

        return advance

    def _is_packed(self, conv: nn.Module) -> bool:
        """Whether a convolution of the fast form is Winograd's."""
        return (
            self.winograd
            and cell_options.is_plain(conv)
            and (conv.kernel_size, conv.stride, conv.dilation) == ((3, 3), (1, 1), (1, 1))
            and conv.groups == 1
            and conv.padding_mode == "zeros"
            and conv.in_channels >= _FEWEST_PACKED_CHANNELS
            and conv.weight.device.type == "cpu"
            and cell_options.is_wide(conv.weight)
        )

    def _classic_step(self, x, h, seen):
        xh = torch.cat([x, seen.to(x.dtype)], dim=1)
        return self._updated(self._convolved_zr(xh), lambda rh: self._candidate(_with_state(xh, x, rh)), h, seen)

    def _strided_step(self, x_gates, h, seen):
        x_zr, x_n = x_gates.tensor_split([2 * self.hidden_channels], dim=1)
        zr = x_zr + self._convolved_state((self.update_gate, self.reset_gate), seen.to(x_gates.dtype))
        return self._updated(zr, lambda rh: x_n + self._convolved_state((self.out_gate,), rh), h, seen)

    def _updated(self, zr, candidate, h, seen):
        z, rh = ops.gru_reset(zr if self.norm_zr is None else self.norm_zr(zr), seen)
        n = candidate(rh)
        return ops.gru_update(z, n if self.norm_n is None else self.norm_n(n), h)

    def _convolved_state(self, gates, h):
        weight = torch.cat([gate.weight[:, self.in_channels :] for gate in gates])
        return cell_options.convolve(h, weight, None, 1, 1, self.out_gate.padding_mode)

    def _convolved(self, x):
        """What x adds to z, r and n."""
        if self.form == "fast":
            if not self._is_packed(self.conv_x):
                return self.conv_x(x)
            return PackedConvolution(self.conv_x.weight, calls=1)(x) + self.conv_x.bias[:, None, None]
        gates = (self.update_gate, self.reset_gate, self.out_gate)
        weight = torch.cat([gate.weight[:, : self.in_channels] for gate in gates])
        bias = torch.cat([gate.bias for gate in gates])
        options = (self.stride, self.dilation, self.out_gate.padding_mode)
        return cell_options.convolve(x, weight, bias, *options)

    def _convolved_zr(self, xh):
        gates = (self.update_gate, self.reset_gate)
        if self.hidden_channels > _MOST_JOINED_CHANNELS:
            return torch.cat([convolved(gate, xh) for gate in gates], dim=1)
        weight, bias = (torch.cat([getattr(gate, name) for gate in gates]) for name in ("weight", "bias"))
        return cell_options.convolve(xh, weight, bias, 1, 1, self.out_gate.padding_mode)

    def _candidate(self, xh):
        return convolved(self.out_gate, xh)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.hidden_channels}, form={self.form!r}"


def _with_state(xh, x, rh) -> Tensor:
    """[x, r*h]. Inference writes r*h over h in [x, h], and so allocates and copies less."""
    if torch.is_grad_enabled() or registration.needs_reference():
        return torch.cat([x, rh], dim=1)
    xh[:, x.shape[1] :] = rh
    return xh


def _convolution(channels, rows, kernel_size, depthwise, groups, bias, window, where) -> nn.Module:
    """VisionCore's rule: depthwise wins over groups, and both give way where there are too few channels."""
    window = {"padding": window.get("dilation", 1) * (kernel_size // 2), **window}
    if depthwise and channels >= 3:
        spatial = nn.Conv2d(channels, channels, kernel_size, groups=channels, bias=False, **window, **where)
        return nn.Sequential(spatial, nn.Conv2d(channels, rows, 1, bias=bias, **where))
    groups = min(groups, channels)
    return nn.Conv2d(channels, rows, kernel_size, groups=groups, bias=bias, **window, **where)
