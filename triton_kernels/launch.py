"""What the launch functions share: the device to launch on, tensors brought into the kernels' layout, tuned tiles."""

import os
from collections.abc import Callable
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor


def launch(kernel, programs: int | Callable[[dict], int]) -> Callable[..., None]:
    """What runs `programs` instances of `kernel` on its arguments, on the device of the first tensor among them.

    A tuned kernel's number follows from the tile: `programs` is then a function of its constants.
    a * b + c is fused into one instruction everywhere: Triton's own default differs from version to version.
    """
    grid = (lambda tile: (programs(tile),)) if callable(programs) else (programs,)

    def run(*arguments, **constants):
        tensor = next(value for value in arguments if isinstance(value, Tensor))
        # Triton launches on the current device.
        with torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext():
            kernel[grid](*arguments, **constants, enable_fp_fusion=True)

    return run


def tuned(configs: list[triton.Config], key: list[str]):
    """Decorates a kernel that has the best of `configs` measured for each new value of the arguments in `key`.

    The configs may differ only in what leaves every sum in its order, so that a choice by time never changes a bit; and
    the key names sizes of a network, never of a batch, a sequence or an image. Choices are kept on disk beside Triton's
    compiled kernels. EVKERNELS_TRITON_AUTOTUNE=0 takes the first config without measuring, as the interpreter does.
    """
    measures = os.environ.get("EVKERNELS_TRITON_AUTOTUNE", "1") != "0" and not triton.knobs.runtime.interpret
    return triton.autotune(configs if measures else configs[:1], key, cache_results=True)


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
