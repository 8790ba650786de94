"""What the launch functions share: block sizes, the device to launch on, tensors brought into the kernels' layout."""

from contextlib import nullcontext

import torch
from torch import Tensor


def on_device_of(tensor: Tensor):
    """Launches inside this context go to the tensor's device (Triton launches on the current one)."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def arithmetic_dtype(tensor: Tensor):
    """The Triton dtype to compute in: float64 for float64, float32 for all others."""
    import triton.language as tl

    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def in_layout(tensor: Tensor | None, layout: torch.memory_format) -> Tensor | None:
    return None if tensor is None else tensor.contiguous(memory_format=layout)


def inner_size(state: Tensor, layout: torch.memory_format) -> int:
    """Length of the rows that elementwise kernels see: one row per pixel in channels_last, one per sample otherwise."""
    return state.shape[1] if layout is torch.channels_last else state[:1].numel()
