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


# 2 / pi in words of 32 bits, after a word of zeros.
_TWO_OVER_PI = tl.constexpr((0, 0xA2F9836E, 0x4E441529, 0xFC2757D1, 0xF534DDC0, 0xDB629599, 0x3C439041, 0xFE5163AB))


@triton.jit
def _word(at, K: tl.constexpr):
    """The word `at` + K of 2 / pi as int64, `at` in 0 to 4."""
    low = tl.where(at == 0, tl.cast(_TWO_OVER_PI[K], tl.int64), tl.cast(_TWO_OVER_PI[K + 1], tl.int64))
    high = tl.where(at == 2, tl.cast(_TWO_OVER_PI[K + 2], tl.int64), tl.cast(_TWO_OVER_PI[K + 3], tl.int64))
    low = tl.where(at < 2, low, high)
    return tl.where(at == 4, tl.cast(_TWO_OVER_PI[K + 4], tl.int64), low) if K < 4 else low


@triton.jit
def _large_angle(x):
    """What whole quarter turns leave of a float32 above 1, at most pi/4 in size, and their number modulo 4.

    Payne and Hanek's reduction: of 2 / pi times the exponent only the 96 bits from 2 on are multiplied by the mantissa.
    """
    bits = x.to(tl.int32, bitcast=True)
    # The mantissa is an integer times 2^(exponent - 150).
    start = ((bits >> 23) & 0xFF) - 120
    at, shift = start >> 5, (start & 31).to(tl.int64)
    mantissa = ((bits & 0x7FFFFF) | 0x800000).to(tl.int64)
    a, b, c, d = _word(at, 0), _word(at, 1), _word(at, 2), _word(at, 3)
    a = (((a << 32) | b) >> (32 - shift)) & 0xFFFFFFFF
    b = (((b << 32) | c) >> (32 - shift)) & 0xFFFFFFFF
    c = (((c << 32) | d) >> (32 - shift)) & 0xFFFFFFFF
    # Quarter turns modulo 4, in units of 2^-62.
    turns = ((mantissa * a) << 32) + mantissa * b + ((mantissa * c) >> 32)
    quadrant = (turns + (1 << 61)) >> 62
    rest = (turns - (quadrant << 62)).to(tl.float32) * 3.406121580086554e-19
    return tl.where(x < 0.0, -rest, rest), tl.where(x < 0.0, -quadrant, quadrant).to(tl.int32)


@triton.jit
def cosine_sine(x):
    """Both, from one reduction, for angles of any size."""
    if x.dtype == tl.float64:
        return tl.cos(x), tl.sin(x)
    else:
        return _cosine_sine_float32(x)


@triton.jit
def _cosine_sine_float32(x):
    """Without a library: its sine keeps a table in local memory and reduces large angles inline for each element."""
    # Adding 1.5 * 2^23 rounds to an integer.
    is_large = ~(tl.abs(x) <= 12800.0)
    turns = tl.where(is_large, 0.0, (x * 0.636619772 + 12582912.0) - 12582912.0)
    # Quarter turns in parts of so few bits that the first two products are exact up to 2^13 of them.
    rest = ((x - turns * 1.5703125) - turns * 0.0004837512969970703) - turns * 7.549790126404332e-08
    quadrant = turns.to(tl.int32)
    if tl.max(is_large.to(tl.int32)) > 0:
        large_rest, large_quadrant = _large_angle(x)
        # Neither infinity nor NaN has a sine.
        large_rest = tl.where(tl.abs(x) < float("inf"), large_rest, float("nan"))
        rest = tl.where(is_large, large_rest, rest)
        quadrant = tl.where(is_large, large_quadrant, quadrant)
    z = rest * rest
    s = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * (z * rest) + rest
    c = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * (z * z) + (1.0 - 0.5 * z)
    swap = (quadrant & 1) != 0
    cosine, sine = tl.where(swap, s, c), tl.where(swap, c, s)
    return tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine), tl.where((quadrant & 2) != 0, -sine, sine)
