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


@triton.jit
def normal_distribution(x):
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """KIND is "none", "relu", "silu" or "gelu"."""
    if KIND == "relu":
        return tl.where(x < 0, 0.0, x)
    if KIND == "silu":
        return x * sigmoid(x)
    if KIND == "gelu":
        return x * normal_distribution(x)
    return x


@triton.jit
def activation_gradient(x, d_y, KIND: tl.constexpr):
    """The gradient at the pre-activation x."""
    if KIND == "relu":
        return tl.where(x <= 0, 0.0, d_y)
    if KIND == "silu":
        s = sigmoid(x)
        return d_y * (s * (1.0 + x * (1.0 - s)))
    if KIND == "gelu":
        return d_y * (normal_distribution(x) + x * tl.exp(-0.5 * x * x) * 0.3989422804014327)
    return d_y
