"""Activations shared by the Triton kernels, in the dtype of their argument (float32 or float64)."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    magnitude = tl.abs(x)
    square = magnitude * magnitude
    result = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * magnitude))
    # The form above cancels near zero; there a minimax polynomial of tanh(x)/x keeps the relative error at 1e-9.
    if x.dtype == tl.float32:
        series = -0.00627423916 * square + 0.021071678
        series = series * square - 0.0538523085
        series = series * square + 0.13332586
        series = series * square - 0.333333164
        result = tl.where(magnitude < 0.55, magnitude + magnitude * square * series, result)
    return tl.where(x < 0.0, -result, result)


@triton.jit
def coarse_tanh(x):
    """Tanh with an absolute error of 1e-7, not a relative one near zero: for results that are rounded to 16 bits."""
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def normal_distribution(x):
    return 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)


@triton.jit
def sigmoid_slope(x):
    """The derivative of the sigmoid, with the relative accuracy that sigmoid(x) * (1 - sigmoid(x)) would lose."""
    tail = tl.exp(-tl.abs(x))
    return tail / ((1.0 + tail) * (1.0 + tail))


@triton.jit
def gelu_tanh_argument(x):
    """2 u with u = sqrt(2 / pi) * (x + 0.044715 x^3): GELU is x * sigmoid(2 u), as that is half of 1 + tanh(u)."""
    return x * (x * x * 0.071354816272600247 + 1.5957691216057308)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """KIND is "none", "relu", "silu", "gelu", "gelu_tanh" or "sigmoid"."""
    if KIND == "relu":
        return tl.where(x < 0, 0.0, x)
    if KIND == "silu":
        return x * sigmoid(x)
    if KIND == "gelu":
        return x * normal_distribution(x)
    if KIND == "gelu_tanh":
        return x * sigmoid(gelu_tanh_argument(x))
    if KIND == "sigmoid":
        return sigmoid(x)
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
    if KIND == "gelu_tanh":
        u = gelu_tanh_argument(x)
        # Held below infinity, where it meets the sigmoid's derivative: that is zero from |x| = 10 on.
        slope = tl.where(x * x > 1e4, 0.0, x * x) * 0.21406444881780074 + 1.5957691216057308
        return d_y * (sigmoid(u) + x * slope * sigmoid_slope(u))
    if KIND == "sigmoid":
        return d_y * sigmoid_slope(x)
    return d_y
