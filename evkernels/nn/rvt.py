"""Recurrent layers of RVT and of its descendant eTraM: 1x1 LSTMs, with or without a depthwise convolution of h.

Drop-in for the originals: constructors, state-dict keys and the call `layer(x, (h, c) or None) -> (h, c)`. The gates go
through the fused op; dropout acts inside the update and in training takes its place in plain PyTorch.
"""

import torch
from torch import Tensor, nn

from evkernels import ops
from evkernels.nn import cell_options
from evkernels.nn.conv_lstm import run_in_one_op
from evkernels.nn.recurrent import RecurrentCell


class _RVTCell(RecurrentCell):
    """What both layers share: as many channels in as hidden, state (h, c), dropout in the update."""

    def __init__(self, dim: int, kernel_size: int, cell_update_dropout: float) -> None:
        super().__init__(dim, dim, kernel_size)
        cell_options.check_probability("cell_update_dropout", cell_update_dropout)
        self.dim = dim
        self.cell_update_dropout = cell_update_dropout

    def forward(self, x: Tensor, h_and_c_previous: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            x: Input [N, dim, H, W].
            h_and_c_previous: h, c [N, dim, H, W] each; zeros if None.

        Returns:
            h, c: the next state. Neither aliases an input.

        Raises:
            ValueError: if shapes disagree.
        """
        self._check_input(x)
        h, c = self.initial_state(x) if h_and_c_previous is None else h_and_c_previous
        self._check_state("h", h, x)
        self._check_state("c", c, x)
        return self._single(x, (h, c))

    def initial_state(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Zero h and c for inputs like `x` [N, dim, H, W], in their dtype and layout."""
        return self._zeros(x), self._zeros(x)

    def _step(self, mask):
        def step(frame, state):
            h, c = self._next(frame, *state)
            return h, (h, c)

        return step

    def _next(self, x, h, c):
        """The state after one step."""
        return self._update(self._gates(x, h), c)

    def _run(self, x, state, reset, active):
        rows = None if active is not None or (self.training and self.cell_update_dropout) else self._rows()
        if rows is None:
            return super()._run(x, state, reset, active)
        return run_in_one_op(self, x, state, reset, *rows)

    def _rows(self) -> tuple[Tensor, Tensor, str] | None:
        """Weight, bias and order of `ops.conv_lstm_1x1` where it is the whole cell, else None."""
        raise NotImplementedError


class DWSConvLSTM2d(_RVTCell):
    """RVT's recurrent layer: a 1x1 LSTM over x and h, where a depthwise convolution may act on h or on both.

    Equivalent to::

        if dws_conv and dws_conv_only_hidden:
            h = conv3x3_dws(h)
        xh = torch.cat([x, h], dim=1)
        if dws_conv and not dws_conv_only_hidden:
            xh = conv3x3_dws(xh)
        f, i, o, g = conv1x1(xh).chunk(4, dim=1)
        c_next = f.sigmoid() * c + i.sigmoid() * dropout(g.tanh())
        h_next = o.sigmoid() * c_next.tanh()

    Args:
        dim: Channels of x, h and c.
        dws_conv: Whether there is a depthwise convolution. Every released RVT configuration says False.
        dws_conv_only_hidden: Whether it sees h alone, else x and h.
        dws_conv_kernel_size: Its side, odd, at most 31.
        cell_update_dropout: Probability to drop an element of tanh(g) in training.

    Raises:
        TypeError: if `dws_conv` or `dws_conv_only_hidden` is no bool.
        ValueError: if the kernel size is even or `cell_update_dropout` no probability.

    `forward` is one step, `forward_sequence` many, without a depthwise convolution in one op. With one of h alone a
    step on the CPU is `ops.depthwise_conv2d` and, up to 128 channels or in 16 bits, `ops.conv_lstm_1x1`. State dict:
    `conv3x3_dws.weight` [dim or 2*dim, 1, k, k] and `.bias` if `dws_conv`, `conv1x1.weight` [4*dim, 2*dim, 1, 1], x
    first, and `.bias`, rows f, i, o, g. Initialised as torch.nn.Conv2d, without a forget bias. Under autocast c is
    float32 and h has the autocast dtype. Source: Gehrig and Scaramuzza 2023 (arXiv:2212.05598).
    """

    def __init__(
        self,
        dim: int,
        dws_conv: bool = True,
        dws_conv_only_hidden: bool = True,
        dws_conv_kernel_size: int = 3,
        cell_update_dropout: float = 0.0,
    ) -> None:
        for name, value in (("dws_conv", dws_conv), ("dws_conv_only_hidden", dws_conv_only_hidden)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
        super().__init__(dim, dws_conv_kernel_size, cell_update_dropout)
        self.conv_only_hidden = dws_conv_only_hidden
        self.conv3x3_dws = nn.Identity()
        if dws_conv:
            channels, k = (dim if dws_conv_only_hidden else 2 * dim), dws_conv_kernel_size
            self.conv3x3_dws = nn.Conv2d(channels, channels, k, padding=k // 2, groups=channels)
        self.conv1x1 = nn.Conv2d(2 * dim, 4 * dim, 1)

    def _next(self, x, h, c):
        if not self._steps_in_one_op(x):
            return super()._next(x, h, c)
        conv = self.conv1x1
        h, c = ops.conv_lstm_1x1(x[None], self._depthwise(h), c, conv.weight, conv.bias, order="fiog")
        # Not an index, whose gradient would be a copy in another layout.
        return h.squeeze(0), c

    def _steps_in_one_op(self, x):
        """Whether a step behind the depthwise convolution of h is `ops.conv_lstm_1x1`, in which products, gates and
        state of a tile of pixels stay in the cache. Every call packs the weight and sums up its gradient anew: with 256
        channels in float32 the library's product and `ops.lstm_gates` are as fast, in training faster.
        """
        kinds = type(self.conv3x3_dws), type(self.conv1x1)
        drops = self.training and self.cell_update_dropout
        return (
            x.device.type == "cpu"
            and (self.dim <= 128 or x.dtype.itemsize == 2)
            and self.conv_only_hidden
            and kinds == (nn.Conv2d, nn.Conv2d)
            and not drops
        )

    def _gates(self, x, h):
        if self.conv_only_hidden:
            return self.conv1x1(torch.cat([x, self._depthwise(h)], dim=1))
        return self.conv1x1(self._depthwise(torch.cat([x, h], dim=1)))

    def _depthwise(self, value):
        if isinstance(self.conv3x3_dws, nn.Identity):
            return value
        return ops.depthwise_conv2d(value, self.conv3x3_dws.weight, self.conv3x3_dws.bias)

    def _rows(self):
        # A convolution that somebody has replaced or parametrised is called as it is.
        if not isinstance(self.conv3x3_dws, nn.Identity) or type(self.conv1x1) is not nn.Conv2d:
            return None
        return self.conv1x1.weight, self.conv1x1.bias, "fiog"

    def _update(self, gates, c):
        if self.training and self.cell_update_dropout:
            return cell_options.lstm_update(gates, c, "fiog", candidate_dropout=self.cell_update_dropout)
        return ops.lstm_gates(gates, c, "fiog")

    def extra_repr(self) -> str:
        return f"{self.dim}, dws_conv_only_hidden={self.conv_only_hidden}"


class PlainLSTM2d(_RVTCell):
    """eTraM's plain LSTM: 1x1 convolutions of x and of h, no depthwise convolution.

    Equivalent to (form="documented")::

        i, f, g, o = (input_transform(x) + hidden_transform(h)).chunk(4, dim=1)
        c_next = dropout(f.sigmoid() * c + i.sigmoid() * g.tanh())
        h_next = o.sigmoid() * c_next.tanh()

    The project's documentation and its published code differ, with the same state dict: the code, form="published", has
    the blocks i, f, o, g and drops elements of tanh(g) as DWSConvLSTM2d does.

    Args:
        dim: Channels of x, h and c.
        cell_update_dropout: Probability to drop an element in training. In the documented form the dropped c, scaled
            by 1 / (1 - p), is carried on, so that its variance grows with time.
        form: "documented" or "published".

    Raises:
        ValueError: if `form` is unknown or `cell_update_dropout` no probability.

    `forward` is one step, `forward_sequence` many, in one op unless there is dropout or `lengths`. State dict:
    `input_transform.{weight,bias}` [4*dim, dim, 1, 1] and `hidden_transform.weight`. Initialised as the published code:
    Xavier-uniform and zero bias, 1 in the forget block, for x; orthogonal for h. Under autocast c is float32 and h has
    the autocast dtype.
    """

    def __init__(self, dim: int, cell_update_dropout: float = 0.0, form: str = "documented") -> None:
        super().__init__(dim, 1, cell_update_dropout)
        cell_options.check_choice("form", form, ("documented", "published"))
        self.form = form
        self.input_transform = nn.Conv2d(dim, 4 * dim, 1)
        self.hidden_transform = nn.Conv2d(dim, 4 * dim, 1, bias=False)
        nn.init.xavier_uniform_(self.input_transform.weight)
        nn.init.zeros_(self.input_transform.bias)
        nn.init.ones_(self.input_transform.bias.data[dim : 2 * dim])
        nn.init.orthogonal_(self.hidden_transform.weight)

    def get_parameter_count(self) -> int:
        """Number of elements of all parameters, 8*dim*dim + 4*dim."""
        return sum(parameter.numel() for parameter in self.parameters())

    _convolves_input = True

    def _convolved(self, x):
        return self.input_transform(x)

    def _gates(self, frame, h):
        return frame + self.hidden_transform(h)

    @property
    def _order(self):
        return "ifgo" if self.form == "documented" else "ifog"

    def _rows(self):
        if type(self.input_transform) is not nn.Conv2d or type(self.hidden_transform) is not nn.Conv2d:
            return None
        weight = torch.cat([self.input_transform.weight, self.hidden_transform.weight], dim=1)
        return weight, self.input_transform.bias, self._order

    def _update(self, gates, c):
        if self.training and self.cell_update_dropout:
            kind = "cell_dropout" if self.form == "documented" else "candidate_dropout"
            return cell_options.lstm_update(gates, c, self._order, **{kind: self.cell_update_dropout})
        return ops.lstm_gates(gates, c, self._order)

    def extra_repr(self) -> str:
        return f"{self.dim}, form={self.form!r}"
