// sigmoid and tanh of gates, for one vector, K interleaved ones or a double. Included inside each instruction set's
// namespace.
//
// Vectors side by side (interleaved.inl) leave the number of operations as the limit, so products share a division,
// and on AVX-512 the sigmoid's exponential takes a table: together 0.68 of lstm_gates' time forward and 0.85 backward
// on a map in the cache (AVX2, by the shared divisions, 0.75 forward). A table for tanh would save nothing: what its
// results near zero lack in relative accuracy costs as many operations to put back as the polynomial.

#include "common/interleaved.inl"

// x, or the limit where x is above or below it; NaN passes.
#if defined(__x86_64__) && EVKERNELS_LANES == 16
EVKERNELS_INLINE VecF at_most(VecF x, float limit) {
  return (VecF)_mm512_maskz_min_ps(kAllLanes, (__m512)splat(limit), (__m512)x);
}
EVKERNELS_INLINE VecF at_least(VecF x, float limit) {
  return (VecF)_mm512_maskz_max_ps(kAllLanes, (__m512)splat(limit), (__m512)x);
}
#else
EVKERNELS_INLINE VecF at_most(VecF x, float limit) { return select(x > limit, splat(limit), x); }
EVKERNELS_INLINE VecF at_least(VecF x, float limit) { return select(x < limit, splat(limit), x); }
#endif

// 2^n of the integer n that adding 1.5 * 2^23 has left in the low bits.
EVKERNELS_INLINE VecF power_of_two(VecF shifted) { return (VecF)(((VecU)shifted << 23) + 0x3f800000); }

// The magnitude of a with the sign of x.
EVKERNELS_INLINE VecF absolute_value(VecF x) { return (VecF)((VecI)x & 0x7fffffff); }
EVKERNELS_INLINE VecF with_sign(VecF magnitude, VecF x) {
  return (VecF)((VecI)magnitude | ((VecI)x & (int32_t)0x80000000));
}

// a / b for finite b. On AVX-512, where a division occupies its unit for 10 to 16 cycles: the reciprocal's first 14
// bits and one step of Newton's on the quotient, which is then rounded as a division is but for one case in thousands.
EVKERNELS_INLINE VecF divide(VecF a, VecF b) {
#if defined(__x86_64__) && EVKERNELS_LANES == 16
  const VecF r = (VecF)_mm512_maskz_rcp14_ps(kAllLanes, (__m512)b), q = a * r;
  return multiply_add((VecF)_mm512_fnmadd_ps((__m512)q, (__m512)b, (__m512)a), r, q);
#else
  return a / b;
#endif
}

// e^y = scale * (1 + rest) for |y| <= 43: y = n * ln2 + r with |r| <= ln2 / 2, scale = 2^n and rest = e^r - 1, whose
// polynomial is fitted to relative errors of 1.4e-8. Adding 1.5 * 2^23 rounds to the integer n.
template <class V>
struct Exponential {
  V scale, rest;
};
template <class V>
EVKERNELS_INLINE Exponential<V> exponential(const V& y) {
  const V shifted = multiply_add(y, 1.44269504f, 12582912.0f), n = shifted - 12582912.0f;
#if EVKERNELS_LANES >= 8
  const V r = multiply_add(n, -0.693147182f, y);  // ln2 + 1.9e-9
#else
  // Where products are rounded before they are added, the first of two must be exact.
  const V r = multiply_add(n, 2.12194440e-4f, multiply_add(n, -0.693359375f, y));
#endif
  V q = multiply_add(r, 1.39465823e-3f, 8.36666034e-3f);
  q = multiply_add(q, r, 4.16662803e-2f);
  q = multiply_add(q, r, 1.66665424e-1f);
  q = multiply_add(q, r, 0.5f);
  return {each(power_of_two, shifted), multiply_add(q, r * r, r)};
}

// Arguments are clamped to +-43, where both functions have long been constant in float32, so that a product of two
// denominators stays finite.

// 1 + e^-x, whose reciprocal is the sigmoid.
template <class V>
EVKERNELS_INLINE V sigmoid_denominator(const V& x) {
  const auto clamped = [](VecF x) EVKERNELS_LOOP_BODY { return at_least(at_most(x, 43.0f), -43.0f); };
#if defined(__x86_64__) && EVKERNELS_LANES == 16
  // -x is (n + r) * ln2 for a multiple n of 1/32 and |r| <= 1/64: a table has the power of n's fraction, scalef takes
  // its whole part, and two terms do for r, to a relative error of 7e-8.
  const auto rest = [](VecF x, VecF n) EVKERNELS_LOOP_BODY { return multiply_add(x, splat(-1.44269502f), -n); };
  const auto scaled = [](VecF q, VecF shifted, VecF n) EVKERNELS_LOOP_BODY {
    const VecF power = fractional_power_of_two(shifted);
    return (VecF)_mm512_maskz_scalef_ps(kAllLanes, (__m512)multiply_add(power, q, power), (__m512)n);
  };
  const V held = each(clamped, x), shifted = multiply_add(held, -1.44269502f, 393216.0f), n = shifted - 393216.0f;
  const V r = each(rest, held, n);
  return 1.0f + each(scaled, multiply_add(r, 2.40228690e-1f, 6.93157340e-1f) * r, shifted, n);
#else
  const auto negative = [](VecF x) EVKERNELS_LOOP_BODY { return -x; };
  const Exponential<V> e = exponential(each(negative, each(clamped, x)));
  return multiply_add(e.scale, e.rest, e.scale + 1.0f);
#endif
}
template <class V>
EVKERNELS_INLINE V sigmoid_of(const V& x) {
  const auto reciprocal = [](VecF x) EVKERNELS_LOOP_BODY { return divide(splat(1.0f), x); };
  return each(reciprocal, sigmoid_denominator(x));
}

// e = exp(2|x|) - 1, of which |tanh x| = e / (2 + e) keeps its relative accuracy near zero.
template <class V>
EVKERNELS_INLINE V tanh_numerator(const V& x) {
  const auto argument = [](VecF x) EVKERNELS_LOOP_BODY {
    const VecF magnitude = absolute_value(x);
    return at_most(magnitude + magnitude, 43.0f);
  };
  const Exponential<V> e = exponential(each(argument, x));
  return multiply_add(e.scale, e.rest, e.scale - 1.0f);
}
// Where e is large, the quotient is 1 - 2 / (2 + e), so that the rounding of 2 + e lands in the small part. Error below
// 0.8 * 2^-23 everywhere (1.3 without the second form, which gradients made of 1 - tanh^2 feel).
template <class V>
EVKERNELS_INLINE V tanh_of(const V& x) {
  const auto quotient = [](VecF e, VecF x) EVKERNELS_LOOP_BODY {
    const VecI large = e > 2.0f;
    const VecF q = divide(select(large, splat(-2.0f), e), 2.0f + e);
    return with_sign(q + select(large, splat(1.0f), splat(0.0f)), x);
  };
  return each(quotient, tanh_numerator(x), x);
}
// sigmoid(x) * tanh(y) with one division.
template <class V>
EVKERNELS_INLINE V sigmoid_times_tanh(const V& x, const V& y) {
  const auto quotient = [](VecF e, VecF denominator, VecF y)
                            EVKERNELS_LOOP_BODY { return with_sign(divide(e, (2.0f + e) * denominator), y); };
  return each(quotient, tanh_numerator(y), sigmoid_denominator(x), y);
}
EVKERNELS_INLINE VecF sigmoid(VecF x) { return sigmoid_of(x); }
EVKERNELS_INLINE VecF tanh(VecF x) { return tanh_of(x); }
template <int K>
EVKERNELS_INLINE Interleaved<VecF, K> sigmoid(const Interleaved<VecF, K>& x) {
  return sigmoid_of(x);
}
template <int K>
EVKERNELS_INLINE Interleaved<VecF, K> tanh(const Interleaved<VecF, K>& x) {
  return tanh_of(x);
}
template <int K>
EVKERNELS_INLINE Interleaved<double, K> sigmoid(const Interleaved<double, K>& x) {
  return each([](double x) EVKERNELS_LOOP_BODY { return sigmoid(x); }, x);
}
template <int K>
EVKERNELS_INLINE Interleaved<double, K> tanh(const Interleaved<double, K>& x) {
  return each([](double x) EVKERNELS_LOOP_BODY { return tanh(x); }, x);
}

// Both for results in bfloat16: errors of 1e-4, relative ones for tanh, are far below their rounding, and on AVX-512
// three terms of a polynomial and a reciprocal of 14 bits are enough.
#if defined(__x86_64__) && EVKERNELS_LANES == 16
EVKERNELS_INLINE VecF coarse_reciprocal(VecF x) { return (VecF)_mm512_maskz_rcp14_ps(kAllLanes, (__m512)x); }
EVKERNELS_INLINE VecF coarse_sigmoid_denominator(VecF x) {
  const __m512 y = (__m512)(x * -1.44269504f);
  const VecF r = (VecF)_mm512_maskz_reduce_ps(kAllLanes, y, 0);  // y - n, zero for infinity
  VecF q = multiply_add(r, 0.05597715f, 0.24222553f);
  q = multiply_add(q, r, 0.69311249f);
  q = multiply_add(q, r, 1.0f);
  return 1.0f + (VecF)_mm512_maskz_scalef_ps(kAllLanes, (__m512)q, (__m512)((VecF)y - r));
}
EVKERNELS_INLINE VecF coarse_tanh_numerator(VecF x) {
  const __m512 y = (__m512)at_most(x * 2.88539008f, 60.0f);
  const VecF r = (VecF)_mm512_maskz_reduce_ps(kAllLanes, y, 0);
  VecF q = multiply_add(r, 0.05597715f, 0.24222553f);
  q = multiply_add(q, r, 0.69311249f);
  const VecF scale = (VecF)_mm512_maskz_scalef_ps(kAllLanes, (__m512)splat(1.0f), (__m512)((VecF)y - r));
  return multiply_add(scale * r, q, scale - 1.0f);
}
EVKERNELS_INLINE VecF coarse_sigmoid(VecF x) { return coarse_reciprocal(coarse_sigmoid_denominator(x)); }
EVKERNELS_INLINE VecF coarse_tanh(VecF x) {
  const VecF e = coarse_tanh_numerator(x);
  return e * coarse_reciprocal(2.0f + e);
}
EVKERNELS_INLINE VecF coarse_sigmoid_times_tanh(VecF x, VecF y) {
  const VecF e = coarse_tanh_numerator(y);
  return e * coarse_reciprocal((2.0f + e) * coarse_sigmoid_denominator(x));
}
#else
EVKERNELS_INLINE VecF coarse_sigmoid(VecF x) { return sigmoid(x); }
EVKERNELS_INLINE VecF coarse_tanh(VecF x) { return tanh(x); }
EVKERNELS_INLINE VecF coarse_sigmoid_times_tanh(VecF x, VecF y) { return sigmoid_times_tanh(x, y); }
#endif

template <class T>
constexpr bool kIsCoarse = false;
template <>
constexpr bool kIsCoarse<BFloat16> = EVKERNELS_LANES == 16;

// sigmoid and tanh for results that are rounded to T.
template <class T, class V>
EVKERNELS_INLINE V sigmoid_for(const V& x) {
  if constexpr (kIsCoarse<T>) {
    return each([](VecF x) EVKERNELS_LOOP_BODY { return coarse_sigmoid(x); }, x);
  } else {
    return sigmoid(x);
  }
}
template <class T, class V>
EVKERNELS_INLINE V tanh_for(const V& x) {
  if constexpr (kIsCoarse<T>) {
    return each([](VecF x) EVKERNELS_LOOP_BODY { return coarse_tanh(x); }, x);
  } else {
    return tanh(x);
  }
}
template <class T, class V>
EVKERNELS_INLINE V sigmoid_times_tanh_for(const V& x, const V& y) {
  if constexpr (kIsCoarse<T>) {
    return each([](VecF x, VecF y) EVKERNELS_LOOP_BODY { return coarse_sigmoid_times_tanh(x, y); }, x, y);
  } else if constexpr (sizeof(T) == sizeof(double)) {
    return sigmoid(x) * tanh(y);
  } else {
    return sigmoid_times_tanh(x, y);
  }
}

// The more precise one of the dtypes of gates and state.
template <class G, class S, bool state = (sizeof(S) > sizeof(G))>
struct PreciseOf {
  using Type = G;
};
template <class G, class S>
struct PreciseOf<G, S, true> {
  using Type = S;
};
template <class G, class S>
using Precise = typename PreciseOf<G, S>::Type;
