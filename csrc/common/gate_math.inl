// sigmoid and tanh at the speed that the dtype of the results allows, for loops in which they are most of the work: the
// functions of vec.inl, without their divisions on AVX-512. Includes nothing.

// a / b for finite b. On AVX-512, where a division occupies its unit for 16 cycles: the reciprocal's first 14 bits and
// one step of Newton's on the quotient, which is then rounded as a division is but for one case in thousands.
EVKERNELS_INLINE VecF divide(VecF a, VecF b) {
#if defined(__x86_64__) && EVKERNELS_LANES == 16
  const VecF r = (VecF)_mm512_maskz_rcp14_ps(kAllLanes, (__m512)b), q = a * r;
  return multiply_add((VecF)_mm512_fnmadd_ps((__m512)q, (__m512)b, (__m512)a), r, q);
#else
  return a / b;
#endif
}

// vec.inl's sigmoid and tanh with this division.
EVKERNELS_INLINE VecF sigmoid_by_newton(VecF x) { return divide(splat(1.0f), 2.0f + expm1(-x)); }
EVKERNELS_INLINE VecF tanh_by_newton(VecF x) {
  const VecI sign = (VecI)x & (int32_t)0x80000000;
  const VecF magnitude = (VecF)((VecI)x ^ sign);
  const VecF e = expm1(magnitude + magnitude);
  const VecI large = e > 2.0f;
  const VecF quotient = divide(select(large, splat(-2.0f), e), 2.0f + e);
  return (VecF)((VecI)(quotient + select(large, splat(1.0f), splat(0.0f))) | sign);
}
EVKERNELS_INLINE double sigmoid_by_newton(double x) { return sigmoid(x); }
EVKERNELS_INLINE double tanh_by_newton(double x) { return tanh(x); }

// sigmoid and tanh for results that are rounded to T. In 16 bits on AVX-512 errors of 1e-4, relative ones for tanh, are
// far below that rounding, and three terms of a polynomial and a reciprocal of 14 bits are enough.
template <class T, class V>
EVKERNELS_INLINE V sigmoid_for(V x) {
#if defined(__x86_64__) && EVKERNELS_LANES == 16
  if constexpr (sizeof(T) == 2) {
    const __m512 y = (__m512)(x * -1.44269504f);
    const VecF r = (VecF)_mm512_maskz_reduce_ps(kAllLanes, y, 0);  // y - n, zero for infinity
    VecF q = multiply_add(r, 0.05597715f, 0.24222553f);
    q = multiply_add(q, r, 0.69311249f);
    q = multiply_add(q, r, 1.0f);
    return (VecF)_mm512_maskz_rcp14_ps(
        kAllLanes, (__m512)(1.0f + (VecF)_mm512_maskz_scalef_ps(kAllLanes, (__m512)q, (__m512)((VecF)y - r))));
  }
#endif
  return sigmoid_by_newton(x);
}
template <class T, class V>
EVKERNELS_INLINE V tanh_for(V x) {
#if defined(__x86_64__) && EVKERNELS_LANES == 16
  if constexpr (sizeof(T) == 2) {
    const __m512 y = _mm512_maskz_min_ps(kAllLanes, _mm512_set1_ps(60.0f), (__m512)(x * 2.88539008f));
    const VecF r = (VecF)_mm512_maskz_reduce_ps(kAllLanes, y, 0);
    VecF q = multiply_add(r, 0.05597715f, 0.24222553f);
    q = multiply_add(q, r, 0.69311249f);
    const VecF scale = (VecF)_mm512_maskz_scalef_ps(kAllLanes, _mm512_set1_ps(1.0f), (__m512)((VecF)y - r));
    const VecF e = multiply_add(scale * r, q, scale - 1.0f);
    return e * (VecF)_mm512_maskz_rcp14_ps(kAllLanes, (__m512)(2.0f + e));
  }
#endif
  return tanh_by_newton(x);
}
