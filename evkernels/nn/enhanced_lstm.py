"""LightweightEnhancedConvLSTM: stacked DWSConvLSTM2d with a spatial attention gate and a residual connection.

eTraM's documentation calls a class of this name as (dim, kernel_size, num_layers, use_attention, use_residual); the
published class takes other arguments, see `evkernels.nn.compat.etram`. This is a design for the documented call, made
so that every part does something from the first step on and gets a gradient.
"""

import torch
from torch import Tensor, nn

from evkernels.nn.recurrent import check_reset, zeroed
from evkernels.nn.rvt import DWSConvLSTM2d


class LightweightEnhancedConvLSTM(nn.Module):
    """Layers of DWSConvLSTM2d whose output is gated pixel by pixel and added to the layer's input.

    Equivalent to (one layer)::

        h, c = cell(x, (h, c))
        if use_attention:
            h = h * 2 * attention(torch.cat([x, h], dim=1)).sigmoid()
        if use_residual:
            h = h + x

    with `attention` = 1x1 convolution to max(4, dim // 16) channels, ReLU, 1x1 convolution to one channel. The h that
    left a layer is its state, as in the published class.

    Args:
        dim: Channels of x and of h and c of every layer.
        kernel_size: Odd side of the depthwise convolution of h, at most 31.
        num_layers: Layers; each takes the output of the one before.
        use_attention: Whether outputs are gated.
        use_residual: Whether the input is added.

    Raises:
        ValueError: if `num_layers` is less than 1 or `kernel_size` even.

    State dict: `cells.<layer>` as in DWSConvLSTM2d, `attention.<layer>.{0,2}.{weight,bias}`. Initialised as
    torch.nn.Conv2d, except that the last convolution of the attention is zero: the gate starts at 1, so that a new
    layer without residual connection is DWSConvLSTM2d.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        num_layers: int = 1,
        use_attention: bool = True,
        use_residual: bool = True,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        self.dim = dim
        self.num_layers = num_layers
        self.use_attention = use_attention
        self.use_residual = use_residual
        self.cells = nn.ModuleList(DWSConvLSTM2d(dim, dws_conv_kernel_size=kernel_size) for _ in range(num_layers))
        self.attention = nn.ModuleList(_attention(dim) for _ in range(num_layers if use_attention else 0))

    def forward(self, x: Tensor, state: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
        """One step.

        Args:
            x: Input [N, dim, H, W].
            state: What the step before returned; zeros if None.

        Returns:
            h, c of the last layer, followed by h, c of the layers before it from the first on: [N, dim, H, W] each. The
            first is the output, all of them are the next state.

        Raises:
            ValueError: if shapes disagree or the state has not two tensors per layer.
        """
        if state is not None and len(state) != 2 * self.num_layers:
            raise ValueError(f"state must hold 2 * num_layers = {2 * self.num_layers} tensors, got {len(state)}")
        states = []
        for layer, cell in enumerate(self.cells):
            # The last layer's pair comes first.
            position = 2 * (layer + 1) % (2 * self.num_layers)
            h, c = cell(x, None if state is None else state[position : position + 2])
            if self.use_attention:
                h = h * (2 * self.attention[layer](torch.cat([x, h], dim=1)).sigmoid())
            x = h + x if self.use_residual else h
            states.append((x, c))
        return tuple(value for pair in (states[-1], *states[:-1]) for value in pair)

    def forward_sequence(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Runs the layers over a sequence, step by step.

        Args:
            x: Inputs [T, N, dim, H, W], T at least 1.
            state: As in `forward`.
            reset: bool [T, N]; where true, the sample's state is zero before that step.

        Returns:
            output, state: h of the last layer [T, N, dim, H, W], and the state after the last step.

        Raises:
            ValueError: if shapes disagree.
            TypeError: if `reset` is no bool tensor.
        """
        if x.dim() != 5 or x.shape[0] == 0:
            raise ValueError(f"x must be [T, N, dim, H, W] with T at least 1, got {tuple(x.shape)}")
        check_reset(reset, x)
        outputs = []
        for time, frame in enumerate(x):
            if reset is not None and state is not None:
                state = zeroed(state, reset[time])
            state = self(frame, state)
            outputs.append(state[0])
        return torch.stack(outputs), state

    def extra_repr(self) -> str:
        return f"{self.dim}, use_attention={self.use_attention}, use_residual={self.use_residual}"


def _attention(dim: int) -> nn.Sequential:
    narrow = max(4, dim // 16)
    attention = nn.Sequential(nn.Conv2d(2 * dim, narrow, 1), nn.ReLU(), nn.Conv2d(narrow, 1, 1))
    nn.init.zeros_(attention[2].weight)
    nn.init.zeros_(attention[2].bias)
    return attention
