"""Argument checks shared by the ops: each raises with the argument's name, what was expected and what came."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, value: object, dtypes: Sequence[torch.dtype] = FLOATING) -> None:
    """`value` is a tensor of one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be of dtype {_either(dtypes)}, got {value.dtype}")


def check_shape(name: str, value: Tensor, shape: Sequence[int], meaning: str) -> None:
    """`value` has exactly `shape`; `meaning` says in words where that shape comes from."""
    if value.shape != tuple(shape):
        raise ValueError(f"{name} must be {meaning} = {tuple(shape)}, got {tuple(value.shape)}")


def check_same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {value.device}")


def check_state_dtype(name: str, state: Tensor, input_name: str, input: Tensor) -> None:
    """A recurrent state has its input's dtype, or float32 beside a 16-bit input."""
    wide = input.dtype in (torch.bfloat16, torch.float16) and state.dtype == torch.float32
    if state.dtype != input.dtype and not wide:
        allowed = (input.dtype,) if input.dtype.itemsize > 2 else (input.dtype, torch.float32)
        raise TypeError(
            f"{name} must be of dtype {_either(allowed)} beside {input_name} in {input.dtype}, got {state.dtype}"
        )


def check_int(name: str, value: object, low: int, high: int) -> None:
    """`value` is an int in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}], got {value}")


def check_permutation(name: str, value: str, letters: str) -> None:
    if value != letters and sorted(value) != sorted(letters):
        raise ValueError(f"{name} must hold each of the letters of {letters!r} once, got {value!r}")


def _either(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)
