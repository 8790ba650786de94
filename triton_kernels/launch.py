"""What the launch functions share: the device to launch on, tensors brought into the kernels' layout."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor


def launch(kernel, programs: int) -> Callable[..., None]:
    """What runs `programs` instances of `kernel` on its arguments, on the device of the first tensor among them.

    a * b + c is fused into one instruction everywhere: Triton's own default differs from version to version.
    """

    def run(*arguments, **constants):
        tensor = next(value for value in arguments if isinstance(value, Tensor))
        # Triton launches on the current device.
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            kernel[(programs,)](*arguments, **constants, enable_fp_fusion=True)

    return run


def arithmetic_dtype(tensor: Tensor):
    """The Triton dtype to compute in: float64 for float64, float32 for all others."""
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


def factor_dtype(tensor: Tensor):
    """The dtype in which factors enter a product: that of the tensor, or float32 in the interpreter, without bfloat16.

    Products of 16-bit factors are exact in float32 either way.
    """
    narrow = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return tl.float32 if triton.knobs.runtime.interpret else narrow.get(tensor.dtype, tl.float32)


def in_layout(tensor: Tensor | None, layout: torch.memory_format) -> Tensor | None:
    return None if tensor is None else tensor.contiguous(memory_format=layout)


def inner_size(state: Tensor, layout: torch.memory_format) -> int:
    """Length of the rows that elementwise kernels see: one row per pixel in channels_last, one per sample otherwise."""
    return state.shape[1] if layout is torch.channels_last else state[:1].numel()
