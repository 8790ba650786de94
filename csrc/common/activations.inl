// ReLU, SiLU, both GELUs and the sigmoid with their gradients, for one element of any arithmetic type: VecF and double
// on the CPU (after vec.inl, inside an instruction set's namespace), float and double on the device (after
// device_math.cuh, inside its namespace). common/activation.h comes first, outside of any namespace. Includes nothing.
//
// Unlike the clamped sigmoid of gates these multiply by x, so the tails must vanish exactly: exp covers the whole
// range, and NaN and infinities come out as in PyTorch (SiLU and GELU of -inf are -inf * 0 = NaN). GELU takes the
// normal distribution's lower tail as exp(-x^2/2) times a polynomial in 1 / (1 + 0.34 |x|): one exponential serves the
// function and its derivative, and negative arguments keep their relative accuracy, which 1 + erf(x / sqrt 2) loses.
// GELU's approximation with tanh is x * sigmoid(2 u), as tanh(u) is 2 * sigmoid(2 u) - 1, and costs what SiLU does.

#if defined(EVKERNELS_LANES)

// 2^r for |r| <= 1/2, relative error 1e-8 before rounding.
EVKERNELS_INLINE VecF power_of_two_polynomial(VecF r) {
  VecF q = multiply_add(r, 1.53533605e-4f, 1.33988750e-3f);
  q = multiply_add(q, r, 9.61843692e-3f);
  q = multiply_add(q, r, 5.55033237e-2f);
  q = multiply_add(q, r, 2.40226477e-1f);
  q = multiply_add(q, r, 6.93147182e-1f);
  return multiply_add(q, r, 1.0f);
}
#if defined(__x86_64__) && EVKERNELS_LANES == 16
// e^x within 2 units in the last place: 2^n * 2^r with n + r = x / ln 2 and |r| <= 1/2. scalef saturates to zero and
// infinity by itself; the bounds only keep infinite x from becoming inf - inf, and NaN passes them.
EVKERNELS_INLINE VecF exp(VecF x) {
  x = (VecF)_mm512_maskz_max_ps(kAllLanes, (__m512)splat(-104.0f), (__m512)x);
  x = (VecF)_mm512_maskz_min_ps(kAllLanes, (__m512)splat(89.0f), (__m512)x);
  const VecF n = multiply_add(x, 1.44269502f, 12582912.0f) - 12582912.0f;
  const VecF q = power_of_two_polynomial(multiply_add(x, 1.92596299e-8f, multiply_add(x, 1.44269502f, -n)));
  return (VecF)_mm512_maskz_scalef_ps(kAllLanes, (__m512)q, (__m512)n);
}
// 1 / x within a unit in the last place for x >= 1: an estimate and one Newton step, which take a third of a division's
// time. From 2^126 on the estimate stands: it is subnormal, and zero for infinity.
EVKERNELS_INLINE VecF reciprocal(VecF x) {
  const __m512 estimate = _mm512_maskz_rcp14_ps(kAllLanes, (__m512)x), one = (__m512)splat(1.0f);
  const __mmask16 below = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(0x1p126f), _CMP_NGE_UQ);
  return (VecF)_mm512_mask_fmadd_ps(estimate, below, _mm512_fnmadd_ps((__m512)x, estimate, one), estimate);
}
#else
// e^x within 2 units in the last place for 2^-126 <= e^x <= 2^127.5; zero below, infinite above.
EVKERNELS_INLINE VecF exp(VecF x) {
  const VecF zero = {};
  const VecI underflow = x < -87.3f;
  x = select(x > 89.0f, zero + 89.0f, x);
  x = select(underflow, zero, x);
  // x = n * ln2 + r with |r| <= ln2 / 2, as in expm1. At n = 128 the exponent's bits are those of infinity.
  const VecF shifted = x * 1.44269504f + 12582912.0f;
  const VecF n = shifted - 12582912.0f;
  const VecF r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  VecF q = r * 1.9841270e-4f + 1.3888889e-3f;
  q = q * r + 8.3333333e-3f;
  q = q * r + 4.1666667e-2f;
  q = q * r + 1.6666667e-1f;
  q = q * r + 0.5f;
  q = q * (r * r) + r;
  const VecF scale = (VecF)(((VecU)shifted << 23) + 0x3f800000);
  return select(underflow, zero, scale * (q + 1.0f));
}
// For x >= 1.
EVKERNELS_INLINE VecF reciprocal(VecF x) { return 1.0f / x; }
// exp(-x^2 / 2), zero where that is below 2^-126, in fewer operations than exp: its argument is never positive, and as
// a power of two, 2^n * 2^r, it needs no reduction by ln 2. n's bits are added to an exponent's, for 2^r is about 1. Of
// NaN it is any number: GELU and its derivative multiply x by it.
EVKERNELS_INLINE VecF bell(VecF x) {
  const VecF zero = {};
  const VecI vanishes = x * x > 174.6f;
  const VecF square = select(vanishes, zero, x * x);
  const VecF shifted = multiply_add(square, -0.721347520f, 12582912.0f), n = shifted - 12582912.0f;
  const VecF q = power_of_two_polynomial(multiply_add(square, -0.721347520f, -n));
  return select(vanishes, zero, (VecF)((VecU)q + ((VecU)shifted << 23)));
}
#endif
EVKERNELS_INLINE VecF absolute(VecF x) { return (VecF)((VecI)x & 0x7fffffff); }
EVKERNELS_INLINE double exp(double x) { return __builtin_exp(x); }
EVKERNELS_INLINE double normal_distribution(double x, double) { return 0.5 * __builtin_erfc(x * -0.70710678118654752); }

#else

EVKERNELS_INLINE float absolute(float x) { return x < 0.0f ? -x : x; }
EVKERNELS_INLINE float reciprocal(float x) { return rcp(x); }
EVKERNELS_INLINE float select(bool mask, float a, float b) { return mask ? a : b; }
EVKERNELS_INLINE double normal_distribution(double x, double) { return 0.5 * ::erfc(x * -0.70710678118654752); }

#endif

EVKERNELS_INLINE double reciprocal(double x) { return 1.0 / x; }
EVKERNELS_INLINE double select(bool mask, double a, double b) { return mask ? a : b; }
template <class V>
EVKERNELS_INLINE V bell(V x) {
  return exp(x * x * -0.5f);
}
EVKERNELS_INLINE double normal_density(double bell) { return bell * 0.39894228040143268; }

template <class V>
EVKERNELS_INLINE V normal_density(V bell) {
  return bell * 0.398942280f;
}

// The share of a normal distribution below x; `bell` is that function of x. Relative error 1.3e-8 before rounding.
template <class V>
EVKERNELS_INLINE V normal_distribution(V x, V bell) {
  const V t = reciprocal(1.0f + 0.34f * absolute(x));
  V tail = t * -2.82823574e-2f + 1.50103256e-1f;
  tail = tail * t - 2.95430869e-1f;
  tail = tail * t + 2.28488013e-1f;
  tail = tail * t - 6.38461784e-2f;
  tail = tail * t + 1.24223761e-1f;
  tail = tail * t + 1.12585947e-1f;
  tail = tail * t + 1.36583000e-1f;
  tail = tail * t + 1.35573432e-1f;
  tail = (tail * t + 1.98863586e-6f) * bell;
  return select(x < 0.0f, tail, 1.0f - tail);
}

// 1 / (1 + e^-x).
template <class V>
EVKERNELS_INLINE V logistic(V x) {
  return reciprocal(1.0f + exp(-x));
}

// x * logistic(u), for u whose NaN reaches the result by another way, too.
template <class V>
EVKERNELS_INLINE V times_logistic(V x, V u) {
#if defined(__x86_64__) && EVKERNELS_LANES == 16
  // In three quarters of the time, with a relative error of 2e-7 + 1.5e-8 |u| where u is negative. e^-u is 2^(n + r)
  // for a multiple n of 1/32 and |r| <= 1/64, so that a table gives the power of n's fraction and two terms do for r;
  // scalef takes n's whole part. |u| is held below 104, where e^-u saturates, by one instruction, which takes NaN for
  // 104.
  if constexpr (sizeof(V) > sizeof(double)) {
    u = (VecF)_mm512_maskz_range_ps(kAllLanes, (__m512)u, (__m512)splat(104.0f), 2);
    const VecF shifted = multiply_add(u, -1.44269502f, 393216.0f), n = shifted - 393216.0f;
    const VecF r = multiply_add(u, -1.44269502f, -n), q = multiply_add(r, 2.40228690e-1f, 6.93157340e-1f) * r;
    const VecF power = fractional_power_of_two(shifted);
    const __m512 e = _mm512_maskz_scalef_ps(kAllLanes, (__m512)multiply_add(power, q, power), (__m512)n);
    return x * reciprocal(1.0f + (VecF)e);
  }
#elif defined(__x86_64__) && EVKERNELS_LANES == 8
  // In two thirds of the time, with such an error: e^-u as in bell, held to 2^-126 where u is large. Where it would
  // pass 2^128 the denominator is infinite.
  if constexpr (sizeof(V) > sizeof(double)) {
    const VecI infinite = u < -88.7f;
    u = (VecF)_mm256_min_ps((__m256)splat(87.3f), (__m256)u);
    const VecF shifted = multiply_add(u, -1.44269502f, 12582912.0f), n = shifted - 12582912.0f;
    const VecF q = power_of_two_polynomial(multiply_add(u, -1.44269502f, -n));
    const VecF e = (VecF)((VecU)q + ((VecU)shifted << 23));
    return x / select(infinite, splat(__builtin_inff()), 1.0f + e);
  }
#endif
  return x * logistic(u);
}

// logistic(x) and its derivative, whose relative accuracy logistic(x) * (1 - logistic(x)) would lose.
template <class V>
struct LogisticPair {
  V value, slope;
};
template <class V>
EVKERNELS_INLINE LogisticPair<V> logistic_pair(V x) {
  const V tail = exp(select(x < 0.0f, x, -x)), larger_share = reciprocal(1.0f + tail);
  const V smaller_share = tail * larger_share;
  return {select(x < 0.0f, smaller_share, larger_share), smaller_share * larger_share};
}

// 2 u with u = sqrt(2 / pi) * (x + 0.044715 x^3), and its derivative. The latter is held below infinity, where it meets
// the logistic's derivative: that is zero from |x| = 10 on.
template <class V>
EVKERNELS_INLINE V gelu_tanh_argument(V x) {
  return x * (x * x * 0.0713548163f + 1.59576912f);
}
EVKERNELS_INLINE double gelu_tanh_argument(double x) { return x * (x * x * 0.071354816272600247 + 1.5957691216057308); }
template <class V>
EVKERNELS_INLINE V gelu_tanh_slope(V x) {
  const V square = x * x;
  return select(square > 1e4f, V{}, square) * 0.214064449f + 1.59576912f;
}
EVKERNELS_INLINE double gelu_tanh_slope(double x) {
  return (x * x > 1e4 ? 0.0 : x * x) * 0.21406444881780074 + 1.5957691216057308;
}

template <Activation kind, class V>
EVKERNELS_INLINE V activate(V x) {
  if constexpr (kind == Activation::kRelu) return select(x < 0.0f, V{}, x);
  if constexpr (kind == Activation::kSilu) return times_logistic(x, x);
  if constexpr (kind == Activation::kGelu) return x * normal_distribution(x, bell(x));
  if constexpr (kind == Activation::kGeluTanh) return times_logistic(x, gelu_tanh_argument(x));
  if constexpr (kind == Activation::kSigmoid) return logistic(x);
  return x;
}

// The gradient at the pre-activation x of an activation whose output's gradient is d_y.
template <Activation kind, class V>
EVKERNELS_INLINE V activation_gradient(V x, V d_y) {
  if constexpr (kind == Activation::kRelu) return select(x <= 0.0f, V{}, d_y);
  if constexpr (kind == Activation::kSilu) {
    const V s = times_logistic(V{} + 1.0f, x);
    return d_y * (s * (1.0f + x * (1.0f - s)));
  }
  if constexpr (kind == Activation::kGelu) {
    const V b = bell(x);
    return d_y * (normal_distribution(x, b) + x * normal_density(b));
  }
  if constexpr (kind == Activation::kGeluTanh) {
    const LogisticPair<V> s = logistic_pair(gelu_tanh_argument(x));
    return d_y * (s.value + x * gelu_tanh_slope(x) * s.slope);
  }
  if constexpr (kind == Activation::kSigmoid) return d_y * logistic_pair(x).slope;
  return d_y;
}

// Calls f(ActivationConstant<kind>{}).
template <class F>
EVKERNELS_INLINE auto with_activation(Activation kind, const F& f) {
  switch (kind) {
    case Activation::kRelu:
      return f(ActivationConstant<Activation::kRelu>{});
    case Activation::kSilu:
      return f(ActivationConstant<Activation::kSilu>{});
    case Activation::kGelu:
      return f(ActivationConstant<Activation::kGelu>{});
    case Activation::kGeluTanh:
      return f(ActivationConstant<Activation::kGeluTanh>{});
    case Activation::kSigmoid:
      return f(ActivationConstant<Activation::kSigmoid>{});
    case Activation::kNone:
      break;
  }
  return f(ActivationConstant<Activation::kNone>{});
}
