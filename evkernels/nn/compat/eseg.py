"""eseg's and EfficientConvLSTM's ConvLSTM, which keeps its state between calls.

`evkernels.nn.ConvLSTM` takes and returns the state instead, and loads the same weights with order="ifog".
"""

from collections.abc import Sequence

from torch import Tensor, nn

from evkernels.nn.conv_lstm import ConvLSTMCell


class ConvLSTM(nn.Module):
    """Stacked ConvLSTM cells over (B, T, C, H, W) that go on where the last call ended.

    Equivalent to::

        x = x.transpose(0, 1)
        for layer, cell in enumerate(cells):
            x, (h[layer], c[layer]) = cell.forward_sequence(x, (h[layer], c[layer]))
        y = x.transpose(0, 1)

    Args:
        input_dim: Channels of x.
        hidden_dims: Channels of h of every layer, one number for all or one each.
        kernel_size: Odd side of the square kernels.
        num_layers: Layers.
        bias: Whether the convolutions have a bias.

    Raises:
        ValueError: if there are not `num_layers` numbers in `hidden_dims`, `num_layers` is less than 1 or
            `kernel_size` even.

    The states are the lists `h` and `c`, of None before the first call and after `reset_hidden()`; they are no part of
    the state dict and keep their graph until `detach_hidden()`, without which a second backward pass through them
    fails and the module cannot be copied. A call with another batch or map size without a reset is an error. State
    dict: `cells.<layer>.conv.{weight,bias}`, x before h, rows i, f, o, g. Initialised as torch.nn.Conv2d.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dims: int | Sequence[int],
        kernel_size: int,
        num_layers: int,
        bias: bool = True,
    ) -> None:
        super().__init__()
        hidden_dims = [hidden_dims] * num_layers if isinstance(hidden_dims, int) else list(hidden_dims)
        if num_layers < 1 or len(hidden_dims) != num_layers:
            raise ValueError(f"hidden_dims must hold num_layers = {num_layers} >= 1 numbers, got {hidden_dims}")
        self.num_layers = num_layers
        self.cells = nn.ModuleList(
            ConvLSTMCell(channels, hidden, kernel_size, bias, order="ifog")
            for channels, hidden in zip([input_dim, *hidden_dims[:-1]], hidden_dims, strict=True)
        )
        self.reset_hidden()

    def forward(self, x: Tensor) -> Tensor:
        """Inputs [B, T, input_dim, H, W], T at least 1, to h of the last layer in every step [B, T, hidden, H, W].

        Raises:
            ValueError: if `x` is not of that shape, or not of the size for which there is a state.
        """
        if x.dim() != 5:
            raise ValueError(f"x must be [B, T, C, H, W], got {tuple(x.shape)}")
        output = x.transpose(0, 1)
        for layer, cell in enumerate(self.cells):
            state = None
            if self.h[layer] is not None:
                state = self.h[layer], self.c[layer]
                cell._check_sequence(output)
                cell._check_state("h", state[0], output[0])
            output, (self.h[layer], self.c[layer]) = cell.forward_sequence(output, state)
        return output.transpose(0, 1)

    def reset_hidden(self) -> None:
        """Forgets the states: the next call starts from zeros."""
        self.h: list[Tensor | None] = [None] * self.num_layers
        self.c: list[Tensor | None] = [None] * self.num_layers

    def detach_hidden(self) -> None:
        """Cuts the states off from the graph of the calls before; harmless where there are none."""
        for states in (self.h, self.c):
            states[:] = [None if value is None else value.detach() for value in states]
