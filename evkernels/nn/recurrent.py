"""What the recurrent cells share: checks, the zero state, and sequences as a loop over steps.

A cell gives `initial_state(x)` and `_step(mask)`, the function for one step; if it `_convolves_input`, `_convolved(x)`
is what of the step does not depend on the state, computed once for all frames.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from evkernels.nn import cell_options
from evkernels.ops import checks, registration

State = Tensor | tuple[Tensor, Tensor]


class RecurrentCell(nn.Module):
    """Base of the cells: `forward` is one step, `forward_sequence` many.

    `stride` and `dilation` are those of the input's convolution, `zoneout` and `recurrent_dropout` probabilities, of
    which `ConvLSTMCell` and `ConvGRUCell` say what they do.
    """

    def __init__(
        self,
        in_channels: int,
        hidden_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        zoneout: float = 0.0,
        recurrent_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if kernel_size % 2 != 1:
            raise ValueError(f"kernel_size must be odd, so that height and width stay, got {kernel_size}")
        for name, value in (("stride", stride), ("dilation", dilation)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        cell_options.check_probability("zoneout", zoneout)
        cell_options.check_probability("recurrent_dropout", recurrent_dropout, below_one=True)
        self.in_channels = in_channels
        self.hidden_channels = hidden_channels
        self.kernel_size = kernel_size
        self.stride = stride
        self.dilation = dilation
        self.zoneout = zoneout
        self.recurrent_dropout = recurrent_dropout

    def forward_sequence(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None, lengths: Tensor | None = None
    ):
        """Runs the cell over a sequence.

        Args:
            x: Inputs [T, N, in_channels, H, W], T at least 1.
            state: State before the first step, as `forward` takes it; zeros if None.
            reset: bool [T, N]; where true, the sample's state is zero before that step (a new recording begins).
            lengths: Integers [N] on the device of `x`; from step lengths[n] on, sample n keeps its state and its output
                is zero, whatever its inputs hold. Never read on the host.

        Returns:
            output, state: h of every step [T, N, hidden_channels, H, W], and the state after the last one.

        Raises:
            ValueError: if a shape is none of those above.
            TypeError: if `reset` is no bool tensor or `lengths` no integer tensor.
        """
        self._check_sequence(x)
        check_reset(reset, x)
        return self._run(x, state, reset, active_steps(lengths, x))

    def _run(self, x: Tensor, state: State | None, reset: Tensor | None, active: Tensor | None):
        """`forward_sequence` with a mask [T, N] of the steps that take place."""
        if state is None:
            state = self.initial_state(x[0])
        if active is not None:
            # The masks below hide what comes of unused frames but not the gradient 0 * NaN of the weights.
            x = x.masked_fill(~active[:, :, None, None, None], 0)
        frames, step = self._sequence(x)
        outputs = []
        for time, frame in enumerate(frames):
            previous = state
            if reset is not None:
                state = zeroed(state, reset[time])
            output, state = step(frame, state)
            if active is not None:
                output = zeroed(output, ~active[time])
                state = chosen(active[time], state, previous)
            outputs.append(output)
        return torch.stack(outputs), state

    def initial_state(self, x: Tensor) -> State:
        """The zero state for inputs like `x` [N, in_channels, H, W], in their dtype and layout."""
        raise NotImplementedError

    def _sequence(self, x: Tensor) -> tuple[Tensor, Callable[[Tensor, State], tuple[Tensor, State]]]:
        """What enters the steps of a sequence x [T, N, C, H, W], and the function (frame, state) -> (h, state)."""
        frames = self._convolved(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if self._convolves_input else x
        return frames, self._step(self._recurrent_mask(x))

    def _single(self, x: Tensor, state: State) -> State:
        """The state after one step, for x [N, C, H, W]."""
        frame = self._convolved(x) if self._convolves_input else x
        return self._step(self._recurrent_mask(x))(frame, state)[1]

    @property
    def _convolves_input(self) -> bool:
        return self.stride != 1 or self.dilation != 1

    def _convolved(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _step(self, mask: Tensor | None) -> Callable[[Tensor, State], tuple[Tensor, State]]:
        """The step in which the h that is convolved is first multiplied by `mask`."""
        raise NotImplementedError

    def _state_shape(self, x: Tensor) -> tuple[int, ...]:
        """Shape of h for inputs like `x` [..., in_channels, H, W]."""
        return (*x.shape[:-3], self.hidden_channels, *((size - 1) // self.stride + 1 for size in x.shape[-2:]))

    def _zeros(self, x: Tensor) -> Tensor:
        return x.new_zeros(self._state_shape(x)).contiguous(memory_format=registration.common_layout(x))

    def _recurrent_mask(self, x: Tensor) -> Tensor | None:
        """One mask for h in all steps of inputs `x` [..., N, C, H, W], or None where nothing is dropped."""
        if not (self.training and self.recurrent_dropout):
            return None
        return functional.dropout(x.new_ones(self._state_shape(x)[-4:]), self.recurrent_dropout)

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must be [N, C, H, W] with C = in_channels = {self.in_channels}, got {tuple(x.shape)}")

    def _check_sequence(self, x: Tensor) -> None:
        if x.dim() != 5 or x.shape[0] == 0:
            raise ValueError(f"x must be [T, N, C, H, W] with T at least 1, got {tuple(x.shape)}")
        self._check_input(x[0])

    def _check_state(self, name: str, state: Tensor, x: Tensor) -> None:
        meaning = "[N, hidden_channels, H, W]" if self.stride == 1 else "[N, hidden_channels, H', W'] after the stride"
        checks.check_shape(name, state, self._state_shape(x), meaning)


def check_reset(reset: Tensor | None, x: Tensor) -> None:
    """Checks that `reset` is None or bool [T, N] of the sequence `x`."""
    if reset is not None:
        checks.check_tensor("reset", reset, (torch.bool,))
        checks.check_shape("reset", reset, x.shape[:2], "[T, N]")


def active_steps(lengths: Tensor | None, x: Tensor) -> Tensor | None:
    """The steps before each sample's length as bool [T, N]; None for None."""
    if lengths is None:
        return None
    checks.check_tensor("lengths", lengths, (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8))
    checks.check_shape("lengths", lengths, x.shape[1:2], "[N]")
    checks.check_same_device("lengths", lengths, "x", x)
    return torch.arange(x.shape[0], device=x.device)[:, None] < lengths


def detach(state):
    """The state cut off from the graph of the steps that led to it, for truncated backpropagation through time.

    Equivalent to::

        torch.utils._pytree.tree_map(lambda value: value.detach(), state)

    Args:
        state: State of any cell or layer: a tensor, or tensors in tuples, lists and dicts; None stays None.

    Returns:
        The same structure of tensors, which share memory with the given ones.
    """
    return tree_map(lambda value: value.detach() if isinstance(value, Tensor) else value, state)


def zeroed(state: State, reset: Tensor) -> State:
    """The state with the samples where `reset` [N] is true set to zero, whatever they held, NaN included."""
    return tree_map(lambda value: value.masked_fill(reset[:, None, None, None], 0), state)


def chosen(active: Tensor, new: State, old: State) -> State:
    """`new` of the samples where `active` [N] is true, `old` of the others, in the dtype of `new`."""
    where = active[:, None, None, None]
    return tree_map(lambda a, b: torch.where(where, a, b.to(a.dtype)), new, old)
