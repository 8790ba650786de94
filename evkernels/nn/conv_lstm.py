"""ConvLSTM cell: one convolution over [x, h], then `ops.lstm_gates`; and converters for published weights.

Published cells differ in the order of their gates only. The cell takes any order as it is (`order`), so that
checkpoints whose keys are `conv.*` load unchanged; the converters permute the rows once, to torch.nn.LSTM's i, f, g, o.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from evkernels import ops
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

    Raises:
        ValueError: if `kernel_size` is even or `order` is no permutation of "ifgo".

    State dict: `conv.weight` [4*hidden_channels, in_channels + hidden_channels, k, k], x first, and `conv.bias`.
    Initialised as torch.nn.Conv2d, without a forget bias. c is float32 under autocast, h has the dtype of the
    convolution. Source: Shi et al. 2015 (arXiv:1506.04214), without peepholes.
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
    ) -> None:
        super().__init__(in_channels, hidden_channels, kernel_size)
        checks.check_permutation("order", order, "ifgo")
        self.order = order
        self.conv = nn.Conv2d(
            in_channels + hidden_channels,
            4 * hidden_channels,
            kernel_size,
            padding=kernel_size // 2,
            bias=bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )

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
        return ops.lstm_gates(self.conv(torch.cat([x, h], dim=1)), c, self.order)

    def initial_state(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Zero h and c for inputs like `x` [N, in_channels, H, W], in their dtype and layout."""
        return self._zeros(x), self._zeros(x)

    def forward_sequence(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, reset: Tensor | None = None):
        # Where no pixel touches another, one op runs the whole sequence. A convolution that somebody has replaced or
        # parametrised is called as it is.
        if self.kernel_size != 1 or type(self.conv) is not nn.Conv2d:
            return super().forward_sequence(x, state, reset)
        self._check_sequence(x, reset)
        h, c = self.initial_state(x[0]) if state is None else state
        self._check_state("h", h, x[0])
        self._check_state("c", c, x[0])
        output, c = ops.conv_lstm_1x1(x, h.to(x.dtype), c, self.conv.weight, self.conv.bias, reset, self.order)
        return output, (output[-1], c)

    def _sequence(self, x):
        def step(frame, state):
            h, c = self(frame, state)
            return h, (h, c)

        return x, step

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.hidden_channels}, order={self.order!r}"

    @classmethod
    def from_e2vid(cls, state_dict: Mapping[str, Tensor], prefix: str = "") -> "ConvLSTMCell":
        """A cell with the weights of E2VID's ConvLSTM: `<prefix>Gates.weight` and `.bias`, blocks i, f, o, g."""
        return cls._from_rows(state_dict[f"{prefix}Gates.weight"], state_dict.get(f"{prefix}Gates.bias"), "ifog")

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
    def _from_rows(cls, weight: Tensor, bias: Tensor | None, order: str) -> "ConvLSTMCell":
        hidden = weight.shape[0] // 4
        cell = cls(
            weight.shape[1] - hidden,
            hidden,
            weight.shape[2],
            bias=bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            for parameter, rows in ((cell.conv.weight, weight), (cell.conv.bias, bias)):
                if rows is not None:
                    blocks = dict(zip(order, rows.chunk(4), strict=True))
                    parameter.copy_(torch.cat([blocks[gate] for gate in cell.order]))
        return cell
