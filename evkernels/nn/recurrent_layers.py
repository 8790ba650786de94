"""ConvLSTM and ConvGRU over whole sequences, with the conventions of torch.nn.LSTM and torch.nn.GRU.

A layer runs over all steps before the next begins, so that a cell may compute for all frames at once what does not
depend on its state. The backward direction is the same cell on the flipped sequence; its masks are flipped too.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from evkernels.nn import cell_options
from evkernels.nn.conv_gru import ConvGRUCell
from evkernels.nn.conv_lstm import ConvLSTMCell
from evkernels.nn.recurrent import State, active_steps, check_reset
from evkernels.ops import checks


class RecurrentLayer(nn.Module):
    """Base of ConvLSTM and ConvGRU: layers and directions of `cell_type`, which takes `options` by keyword."""

    cell_type: type
    state_names: tuple[str, ...]

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int = 3,
        num_layers: int = 1,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        stride: int = 1,
        **options,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        cell_options.check_probability("dropout", dropout)
        self.in_channels = in_channels
        self.hidden_channels = hidden_channels
        self.num_layers = num_layers
        self.batch_first = batch_first
        self.dropout = dropout
        self.bidirectional = bidirectional
        directions = 2 if bidirectional else 1
        self.cells = nn.ModuleList()
        for layer in range(num_layers):
            channels, layer_stride = (directions * hidden_channels, 1) if layer else (in_channels, stride)
            for _ in range(directions):
                cell = self.cell_type(channels, hidden_channels, kernel_size, stride=layer_stride, **options)
                self.cells.append(cell)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ):
        """Runs all layers over a sequence.

        Args:
            x: Inputs [T, N, in_channels, H, W], T at least 1, or [N, T, in_channels, H, W] with `batch_first`.
            state: State before the first step, as returned; zeros if None.
            reset: bool [T, N], [N, T] with `batch_first`; where true, a new recording begins at that step: no state
                crosses, forward or backward, and neither does a gradient.
            lengths: Integers [N] on the device of `x`: sample n ends before step lengths[n]. Its outputs from there on
                are zero, its state is the one after its last step, and its inputs from there on have no effect: equal
                to a sequence that was trimmed. Never read on the host.

        Returns:
            output, state: h of the last layer [T, N, D*hidden_channels, H, W] (as `x` if `batch_first`), forward
            before backward direction (D = 2), and the state after the last step, as the class says.

        Raises:
            ValueError: if a shape is none of those above.
            TypeError: if `reset` is no bool tensor or `lengths` no integer tensor.
        """
        if self.batch_first and x.dim() == 5:
            x = x.transpose(0, 1)
            reset = reset.transpose(0, 1) if reset is not None and reset.dim() == 2 else reset
        first = self.cells[0]
        first._check_sequence(x)
        check_reset(reset, x)
        active = active_steps(lengths, x)
        if state is not None:
            self._check_state(state, first._state_shape(x[0]))
        output, states = x, []
        directions = 2 if self.bidirectional else 1
        for layer in range(self.num_layers):
            if layer and self.dropout:
                output = functional.dropout(output, self.dropout, self.training)
            parts = []
            for direction in range(directions):
                index = layer * directions + direction
                begin = None if state is None else tree_map(lambda value, index=index: value[index], state)
                part, end = _in_direction(self.cells[index], direction, output, begin, reset, active)
                parts.append(part)
                states.append(end)
            output = torch.cat(parts, dim=2) if self.bidirectional else parts[0]
        state = tree_map(lambda *values: torch.stack(values), *states)
        return (output.transpose(0, 1) if self.batch_first else output), state

    def _check_state(self, state: State, shape: tuple[int, ...]) -> None:
        single = len(self.state_names) == 1
        if not single and (not isinstance(state, tuple | list) or len(state) != len(self.state_names)):
            raise ValueError(f"state must be ({', '.join(self.state_names)}), got {type(state).__name__}")
        for name, value in zip(self.state_names, (state,) if single else state, strict=True):
            checks.check_tensor(name, value)
            meaning = "[num_layers * directions, N, hidden_channels, H, W]"
            checks.check_shape(name, value, (len(self.cells), *shape), meaning)

    def extra_repr(self) -> str:
        options = f"num_layers={self.num_layers}, batch_first={self.batch_first}, bidirectional={self.bidirectional}"
        return f"{self.in_channels}, {self.hidden_channels}, {options}"


def _in_direction(cell, backward: int, x: Tensor, state, reset: Tensor | None, active: Tensor | None):
    """One cell over `x` from its first step on, or from its last; the output is in the order of `x`."""
    if backward:
        x = x.flip(0)
        active = None if active is None else active.flip(0)
        if reset is not None:
            # Backwards a recording is entered at its last step, the one before the next recording's first.
            reset = torch.cat([reset[1:], torch.zeros_like(reset[:1])]).flip(0)
    if active is None:
        output, state = cell.forward_sequence(x, state, reset)
    else:
        output, state = cell._run(x, state, reset, active)
    return (output.flip(0) if backward else output), state


class ConvLSTM(RecurrentLayer):
    """Convolutional LSTM over sequences: torch.nn.LSTM for maps.

    Equivalent to (one layer, one direction)::

        outputs = []
        for frame in x:
            h, c = cell(frame, (h, c))
            outputs.append(h)
        output, state = torch.stack(outputs), (h[None], c[None])

    Args:
        in_channels: Channels of x.
        hidden_channels: Channels of h and c in every layer.
        kernel_size: Odd side of the square kernels.
        num_layers: Layers; each takes the output of the one before.
        batch_first: Whether x, output and `reset` are [N, T, ...]. The state is not affected.
        dropout: Probability to drop an element of the output of every layer but the last, in training.
        bidirectional: Whether every layer also runs backwards, with weights of its own.
        stride: Of the first layer's convolution of x.
        options: Keywords of `ConvLSTMCell`, for every cell: bias, order, padding_mode, dilation, norm_groups,
            peephole, gate_activation, activation, zoneout, zoneout_c, recurrent_dropout, cell_dropout, winograd,
            device, dtype.

    Raises:
        ValueError: if `num_layers` is less than 1, `dropout` no probability, or as `ConvLSTMCell` does.

    `forward` is `RecurrentLayer.forward`; its state is h, c [num_layers*D, N, hidden_channels, H, W] each, index
    layer*D + direction. A call of one step continues from the state of the call before, so a stream gives the numbers
    of the whole sequence. State dict: `cells.<layer*D + direction>.<name in ConvLSTMCell>`, for one direction the keys
    of eseg's ConvLSTM (order="ifog"). Initialised as its cells.
    """

    cell_type = ConvLSTMCell
    state_names = ("h", "c")


class ConvGRU(RecurrentLayer):
    """Convolutional GRU over sequences: torch.nn.GRU for maps, with the cells of the event-camera networks.

    Equivalent to (one layer, one direction)::

        outputs = []
        for frame in x:
            h = cell(frame, h)
            outputs.append(h)
        output, state = torch.stack(outputs), h[None]

    Args:
        in_channels: Channels of x.
        hidden_channels: Channels of h in every layer.
        kernel_size: Odd side of the square kernels.
        num_layers: Layers; each takes the output of the one before.
        batch_first: Whether x, output and `reset` are [N, T, ...]. The state is not affected.
        dropout: Probability to drop an element of the output of every layer but the last, in training.
        bidirectional: Whether every layer also runs backwards, with weights of its own.
        stride: Of the first layer's convolution of x.
        options: Keywords of `ConvGRUCell`, for every cell: form, layer_norm, depthwise, groups, padding_mode, dilation,
            norm_groups, zoneout, recurrent_dropout, winograd, device, dtype.

    Raises:
        ValueError: if `num_layers` is less than 1, `dropout` no probability, or as `ConvGRUCell` does.

    `forward` is `RecurrentLayer.forward`; its state is h [num_layers*D, N, hidden_channels, H, W], index
    layer*D + direction. A call of one step continues from the state of the call before, so a stream gives the numbers
    of the whole sequence. State dict: `cells.<layer*D + direction>.<name in ConvGRUCell>`. Initialised as its cells.
    """

    cell_type = ConvGRUCell
    state_names = ("h",)
