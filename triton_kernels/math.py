"""Activations shared by the Triton kernels, in the dtype of their argument (float32 or float64)."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    wide = 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
    if x.dtype == tl.float64:
        return wide
    # The form above cancels near zero; there the odd Taylor polynomial keeps the relative error below 1e-7.
    s = x * x
    narrow = x * (1.0 + s * (-1.0 / 3.0 + s * (2.0 / 15.0 + s * (-17.0 / 315.0 + s * (62.0 / 2835.0)))))
    return tl.where(tl.abs(x) < 0.25, narrow, wide)
