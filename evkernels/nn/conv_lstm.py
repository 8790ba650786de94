"""ConvLSTM cell: one convolution over [x, h], then `ops.lstm_gates`; and converters for published weights.

Where nothing but the convolution and the gates acts on the state, 1x1 and 3x3 cells are one op for all steps:
`ops.conv_lstm_1x1` and `ops.conv_lstm_3x3`.

Published cells differ in the order of their gates only. The cell takes any order as it is (`order`), so that
checkpoints whose keys are `conv.*` load unchanged; the converters permute the rows once, to torch.nn.LSTM's i, f, g, o.

With a stride or dilation the columns of the one weight that belong to x are convolved on their own, over all frames of
a sequence at once: the state dict stays the same.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from evkernels import ops
from evkernels.nn import cell_options
from evkernels.nn.convolution import convolved
from evkernels.nn.recurrent import RecurrentCell
from evkernels.ops import checks


class ConvLSTMCell(RecurrentCell):
    """Convolutional LSTM cell: one convolution, one fused gate update.

    Equivalent to::

        i, f, g, o = conv(torch.cat([x, h], dim=1)).chunk(4, dim=1)
        c_next = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h_next = o.sigmoid() * c_next.tanh()

    Args:
        in_channels: Channels of x.
        hidden_channels: Channels of h and c.
        kernel_size: Odd side of the square kernel; height and width stay.
        bias: Whether the convolution has a bias.
        order: Order of the gates' blocks in the rows of `conv`: a permutation of "ifgo". "ifog" loads the weights of
            eseg and EfficientConvLSTM as they are.
        padding_mode: As in torch.nn.Conv2d.
        stride: Of the convolution of x: h and c are [N, hidden_channels, ceil(H / stride), ceil(W / stride)].
        dilation: Of the convolution of x; that of h has none.
        norm_groups: If given, a GroupNorm of that many groups in each gate's pre-activations; 1 is the layer norm of
            each gate over channels and pixels.
        peephole: Whether i and f see c, and o sees c_next, through one learned weight per channel.
        gate_activation: "sigmoid" or "hardsigmoid", of i, f and o.
        activation: "tanh" or "hardtanh", of g and c_next.
        zoneout: Probability with which an element of h keeps its previous value in training; its mean otherwise.
        zoneout_c: The same of c. h is formed from c before zoneout.
        recurrent_dropout: Probability to drop an element of the h that is convolved, in training; one mask for all
            steps of a sequence, and one per call of `forward`.
        cell_dropout: Probability to drop an element of the activated g in training, anew at every step.
        winograd: Whether a 3x3 cell without options and of at least 8 hidden channels runs, in float32, as
            `ops.conv_lstm_3x3`, whose convolution on the CPU is Winograd's, with about three times the rounding error
            of PyTorch's; single steps do so without gradients only, and not on small maps.

    Raises:
        ValueError: if `kernel_size` is even, `order` is no permutation of "ifgo", or an option is not among those
            above.

    State dict: `conv.weight` [4*hidden_channels, in_channels + hidden_channels, k, k], x first, and `conv.bias`; with
    the options `norm.{weight,bias}` [4*hidden_channels] and `peephole` [3, hidden_channels, 1, 1], rows i, f, o.
    Initialised as torch.nn.Conv2d, without a forget bias; peepholes are zero. c is float32 under autocast, h has the
    dtype of the convolution. Peepholes, hard activations and, in training, cell dropout take the gate update out of
    the fused op. Source: Shi et al. 2015 (arXiv:1506.04214); zoneout Krueger et al. 2017 (arXiv:1606.01305), recurrent
    dropout Gal and Ghahramani 2016 (arXiv:1512.05287), cell dropout Semeniuta et al. 2016 (arXiv:1603.05118).
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int = 3,
        bias: bool = True,
        order: str = "ifgo",
        padding_mode: str = "zeros",
        device=None,
        dtype=None,
        *,
        stride: int = 1,
        dilation: int = 1,
        norm_groups: int | None = None,
        peephole: bool = False,
        gate_activation: str = "sigmoid",
        activation: str = "tanh",
        zoneout: float = 0.0,
        zoneout_c: float = 0.0,
        recurrent_dropout: float = 0.0,
        cell_dropout: float = 0.0,
        winograd: bool = True,
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
        checks.check_permutation("order", order, "ifgo")
        cell_options.check_choice("gate_activation", gate_activation, cell_options.GATE_ACTIVATIONS)
        cell_options.check_choice("activation", activation, cell_options.ACTIVATIONS)
        cell_options.check_probability("zoneout_c", zoneout_c)
        cell_options.check_probability("cell_dropout", cell_dropout, below_one=True)
        self.order = order
        self.gate_activation = gate_activation
        self.activation = activation
        self.zoneout_c = zoneout_c
        self.cell_dropout = cell_dropout
        self.winograd = winograd
        where = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(
            in_channels + hidden_channels,
            4 * hidden_channels,
            kernel_size,
            padding=kernel_size // 2,
            bias=bias,
            padding_mode=padding_mode,
            **where,
        )
        self.norm = cell_options.gate_norm(4, norm_groups, hidden_channels, **where)
        self.peephole = nn.Parameter(torch.zeros(3, hidden_channels, 1, 1, **where)) if peephole else None

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step, with the convention of torch.nn.LSTMCell.

        Args:
            x: Input [N, in_channels, H, W].
            state: h, c [N, hidden_channels, H, W] each; zeros if None. c may be float32 beside 16-bit inputs and then
                stays float32.

        Returns:
            h, c: the next state. Neither aliases an input.

        Raises:
            ValueError: if shapes disagree.
        """
        self._check_input(x)
        h, c = self.initial_state(x) if state is None else state
        self._check_state("h", h, x)
        self._check_state("c", c, x)
        return self._single(x, (h, c))

    def initial_state(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Zero h and c for inputs like `x` [N, in_channels, H, W], in their dtype and layout."""
        return self._zeros(x), self._zeros(x)

    def _run(self, x, state, reset, active):
        op = self._one_op(x) if active is None else None
        if op is None:
            return super()._run(x, state, reset, active)
        return run_in_one_op(self, x, state, reset, self.conv.weight, self.conv.bias, self.order, op)

    def _single(self, x, state):
        # The weights of the 3x3 op are packed for each call. One step with its gradient is 0.6 to 1.1 times as fast as
        # PyTorch's convolution, one without 1.1 to 1.6 times from some 350 pixels on, 0.6 times at 180.
        is_small = x.shape[0] * x.shape[2] * x.shape[3] < 350
        if is_small or torch.is_grad_enabled() or self._one_op(x) is not ops.conv_lstm_3x3:
            return super()._single(x, state)
        return self._run(x[None], state, None, None)[1]

    def _one_op(self, x: Tensor) -> Callable | None:
        """The op that runs whole sequences of inputs like `x`, if there is one and nothing else acts on the state."""
        drops = self.training and (self.recurrent_dropout or self.cell_dropout)
        if (
            self._convolves_input
            or drops
            or self.zoneout
            or self.zoneout_c
            or self.norm is not None
            or self.peephole is not None
            or (self.gate_activation, self.activation) != ("sigmoid", "tanh")
            or not cell_options.is_plain(self.conv)
        ):
            return None
        if self.kernel_size == 1:
            return ops.conv_lstm_1x1
        is_3x3 = self.kernel_size == 3 and self.conv.padding_mode == "zeros"
        # One thread, sequences of 5, x and h of as many channels: 1.4 to 1.9 times PyTorch's library from 16 to 256
        # channels, 1.2 to 1.4 with the gradient; with 8 channels 1.2 to 1.3, and as fast with the gradient; with 4 0.6.
        is_3x3 = is_3x3 and self.hidden_channels >= 8
        return ops.conv_lstm_3x3 if is_3x3 and self.winograd and cell_options.is_wide(x) else None

    def _step(self, mask):
        def step(frame, state):
            h, c = state
            gates = self._gates(frame, h if mask is None else h * mask)
            h_next, c_next = self._update(gates if self.norm is None else self.norm(gates), c)
            h_next = cell_options.zoneout(h_next, h, self.zoneout, self.training)
            return h_next, (h_next, cell_options.zoneout(c_next, c, self.zoneout_c, self.training))

        return step

    def _convolved(self, x):
        """What x adds to the gates."""
        conv = self.conv
        weight = conv.weight[:, : self.in_channels]
        options = (self.stride, self.dilation, conv.padding_mode)
        return cell_options.convolve(x, weight, conv.bias, *options)

    def _gates(self, frame, h):
        if not self._convolves_input:
            return convolved(self.conv, torch.cat([frame, h], dim=1))
        weight = self.conv.weight[:, self.in_channels :]
        return frame + cell_options.convolve(h, weight, None, 1, 1, self.conv.padding_mode)

    def _update(self, gates, c):
        dropout = self.cell_dropout if self.training else 0.0
        if self.peephole is None and not dropout and (self.gate_activation, self.activation) == ("sigmoid", "tanh"):
            return ops.lstm_gates(gates, c, self.order)
        return cell_options.lstm_update(
            gates,
            c,
            self.order,
            peephole=self.peephole,
            gate_activation=self.gate_activation,
            activation=self.activation,
            candidate_dropout=dropout,
        )

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.hidden_channels}, order={self.order!r}"

    @classmethod
    def from_e2vid(
        cls, state_dict: Mapping[str, Tensor], prefix: str = "", padding_mode: str = "zeros"
    ) -> "ConvLSTMCell":
        """A cell with the weights of E2VID's ConvLSTM: `<prefix>Gates.weight` and `.bias`, blocks i, f, o, g.

        CISTA-TC has the same keys and padding_mode="reflect".
        """
        rows = state_dict[f"{prefix}Gates.weight"], state_dict.get(f"{prefix}Gates.bias")
        return cls._from_rows(*rows, "ifog", padding_mode=padding_mode)

    @classmethod
    def from_eseg(cls, state_dict: Mapping[str, Tensor], prefix: str = "") -> "ConvLSTMCell":
        """A cell with the weights of eseg's ConvLSTMCell: `<prefix>conv.weight` and `.bias`, blocks i, f, o, g.

        A cell of order="ifog" takes the same weights by `load_state_dict`, rows as they are.
        """
        return cls._from_rows(state_dict[f"{prefix}conv.weight"], state_dict.get(f"{prefix}conv.bias"), "ifog")

    @classmethod
    def from_rvt(cls, state_dict: Mapping[str, Tensor], prefix: str = "") -> "ConvLSTMCell":
        """A cell with the weights of RVT's DWSConvLSTM2d(dws_conv=False): `<prefix>conv1x1.*`, blocks f, i, o, g.

        Raises:
            ValueError: if the weights have a depthwise convolution, which this cell has not.
        """
        if f"{prefix}conv3x3_dws.weight" in state_dict:
            raise ValueError(f"{prefix}conv3x3_dws.weight: a cell with a depthwise convolution on h is no ConvLSTMCell")
        return cls._from_rows(state_dict[f"{prefix}conv1x1.weight"], state_dict.get(f"{prefix}conv1x1.bias"), "fiog")

    @classmethod
    def from_torch_lstm(cls, lstm: nn.LSTM | nn.LSTMCell, layer: int = 0) -> "ConvLSTMCell":
        """A 1x1 cell that does at every pixel what one layer of a torch.nn.LSTM, or an LSTMCell, does to a vector.

        Raises:
            ValueError: if the LSTM is bidirectional or has projections.
        """
        if getattr(lstm, "bidirectional", False) or getattr(lstm, "proj_size", 0):
            raise ValueError("lstm must be unidirectional and without projections (proj_size=0)")
        suffix = f"_l{layer}" if isinstance(lstm, nn.LSTM) else ""
        weight = torch.cat([getattr(lstm, f"weight_{part}{suffix}") for part in ("ih", "hh")], dim=1)
        bias = None
        if lstm.bias:
            bias = getattr(lstm, f"bias_ih{suffix}") + getattr(lstm, f"bias_hh{suffix}")
        return cls._from_rows(weight[:, :, None, None], bias, "ifgo")

    @classmethod
    def _from_rows(cls, weight: Tensor, bias: Tensor | None, order: str, **options) -> "ConvLSTMCell":
        hidden = weight.shape[0] // 4
        cell = cls(
            weight.shape[1] - hidden,
            hidden,
            weight.shape[2],
            bias=bias is not None,
            device=weight.device,
            dtype=weight.dtype,
            **options,
        )
        with torch.no_grad():
            for parameter, rows in ((cell.conv.weight, weight), (cell.conv.bias, bias)):
                if rows is not None:
                    blocks = dict(zip(order, rows.chunk(4), strict=True))
                    parameter.copy_(torch.cat([blocks[gate] for gate in cell.order]))
        return cell


def run_in_one_op(
    cell: RecurrentCell,
    x: Tensor,
    state,
    reset: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    order: str,
    op: Callable = ops.conv_lstm_1x1,
):
    """`cell.forward_sequence` where the cell is nothing but `op` with these parameters."""
    h, c = cell.initial_state(x[0]) if state is None else state
    cell._check_state("h", h, x[0])
    cell._check_state("c", c, x[0])
    output, c = op(x, h.to(x.dtype), c, weight, bias, reset, order)
    return output, (output[-1], c)
