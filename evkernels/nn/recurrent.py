"""What the recurrent cells share: checks, the zero state, and sequences as a loop over steps.

A cell gives `initial_state(x)` and `_sequence(x)`, the frames of a sequence and the function for one step: what does
not depend on the state is computed there, once for all frames.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from evkernels.ops import checks, registration

State = Tensor | tuple[Tensor, Tensor]


class RecurrentCell(nn.Module):
    """Base of the cells: `forward` is one step, `forward_sequence` many."""

    def __init__(self, in_channels: int, hidden_channels: int, kernel_size: int) -> None:
        super().__init__()
        if kernel_size % 2 != 1:
            raise ValueError(f"kernel_size must be odd, so that height and width stay, got {kernel_size}")
        self.in_channels = in_channels
        self.hidden_channels = hidden_channels
        self.kernel_size = kernel_size

    def forward_sequence(self, x: Tensor, state: State | None = None, reset: Tensor | None = None):
        """Runs the cell over a sequence.

        Args:
            x: Inputs [T, N, in_channels, H, W], T at least 1.
            state: State before the first step, as `forward` takes it; zeros if None.
            reset: bool [T, N]; where true, the sample's state is zero before that step (a new recording begins).

        Returns:
            output, state: h of every step [T, N, hidden_channels, H, W], and the state after the last one.

        Raises:
            ValueError: if a shape is none of those above.
            TypeError: if `reset` is no bool tensor.
        """
        self._check_sequence(x, reset)
        if state is None:
            state = self.initial_state(x[0])
        frames, step = self._sequence(x)
        outputs = []
        for time, frame in enumerate(frames):
            if reset is not None:
                state = zeroed(state, reset[time])
            output, state = step(frame, state)
            outputs.append(output)
        return torch.stack(outputs), state

    def initial_state(self, x: Tensor) -> State:
        """The zero state for inputs like `x` [N, in_channels, H, W], in their dtype and layout."""
        raise NotImplementedError

    def _sequence(self, x: Tensor) -> tuple[Iterable[Tensor], Callable[[Tensor, State], tuple[Tensor, State]]]:
        raise NotImplementedError

    def _zeros(self, x: Tensor) -> Tensor:
        zeros = x.new_zeros(x.shape[0], self.hidden_channels, *x.shape[2:])
        return zeros.contiguous(memory_format=registration.common_layout(x))

    def _check_sequence(self, x: Tensor, reset: Tensor | None) -> None:
        if x.dim() != 5 or x.shape[0] == 0:
            raise ValueError(f"x must be [T, N, C, H, W] with T at least 1, got {tuple(x.shape)}")
        self._check_input(x[0])
        if reset is not None:
            checks.check_tensor("reset", reset, (torch.bool,))
            checks.check_shape("reset", reset, x.shape[:2], "[T, N]")

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be [N, C, H, W] with C = in_channels = {self.in_channels}, got {tuple(x.shape)}")

    def _check_state(self, name: str, state: Tensor, x: Tensor) -> None:
        checks.check_shape(name, state, (x.shape[0], self.hidden_channels, *x.shape[2:]), "[N, hidden_channels, H, W]")


def zeroed(state: State, reset: Tensor) -> State:
    """The state with the samples where `reset` [N] is true set to zero, whatever they held, NaN included."""
    return tree_map(lambda value: value.masked_fill(reset[:, None, None, None], 0), state)
