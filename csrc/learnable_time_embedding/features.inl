// The features of a block of timestamps: sines and cosines of all harmonics, tanh and spline bases, and the way back
// from their gradients to those of their arguments. Included by loops.inl.

// One quarter turn, pi/2, as a sum: the first two parts have so few bits that their products with up to 2^30 quarter
// turns are exact, with or without a fused multiply-add.
constexpr double kQuarter[3] = {0x1.921fb40000000p+0, 0x1.4442d00000000p-24, 0x1.8469898cc5170p-48};
constexpr double kLargestAngle = 1073741824.0;
// Whether a * b + c rounds once: pairs of floats hold angles exactly then, up to this size.
#if EVKERNELS_LANES > 4 || defined(__aarch64__)
constexpr float kLargestPair = 8192.0f;
#else
constexpr float kLargestPair = -1.0f;
#endif

EVKERNELS_INLINE VecF magnitude(VecF x) { return (VecF)((VecI)x & 0x7fffffff); }
EVKERNELS_INLINE double magnitude(double x) { return __builtin_fabs(x); }

// The angles time * rate + shift reduced to [-pi/4, pi/4] and a whole number of quarter turns. Angles and reduction are
// exact to twice the bits of a float, so that large angles cost nothing extra, and their rounding, which the gradients
// of high harmonics multiply by their order squared, does not count. Returns which lanes are not such small angles.
EVKERNELS_INLINE VecI reduce_small(VecF time, float rate, float shift, VecF& rest, VecI& quadrant) {
  // Adding zero in the same instruction: nothing is left that a compiler could fuse with the sum below.
  const VecF product = multiply_add(time, rate, VecF{}), product_rest = multiply_add(time, splat(rate), -product);
  const VecF angle = product + shift, added = angle - product;
  const VecF angle_rest = ((product - (angle - added)) + (shift - added)) + product_rest;
  // Adding 1.5 * 2^23 rounds to an integer.
  const VecF turns = multiply_add(angle, 0.636619772f, 12582912.0f) - 12582912.0f;
  // The first is exact: 24 bits hold it.
  const VecF first = multiply_add(turns, -0x1.921fb6p+0f, angle);
  rest = first + multiply_add(turns, 0x1.777a5cp-25f, angle_rest);
  quadrant = __builtin_convertvector(turns, VecI);
  return (VecI) ~(magnitude(angle) <= kLargestPair);
}

// The same in double, for angles up to 2^30; 0 for those beyond.
static void reduce_large(const float* time, float rate, float shift, float* rest, int32_t* quadrant) {
  for (int64_t n = 0; n < kTimes; ++n) {
    const double angle = (double)time[n] * rate + shift, x = __builtin_fabs(angle) <= kLargestAngle ? angle : 0.0;
    // Adding 1.5 * 2^52 rounds to an integer.
    const double turns = (x * 0.6366197723675814 + 6755399441055744.0) - 6755399441055744.0;
    rest[n] = (float)(((x - turns * kQuarter[0]) - turns * kQuarter[1]) - turns * kQuarter[2]);
    quadrant[n] = (int32_t)turns;
  }
}

// Cosine and sine of an angle reduced to [-pi/4, pi/4] and `quadrant` quarter turns.
EVKERNELS_INLINE void sine_of_rest(VecF rest, VecI quadrant, float* cosine, float* sine) {
  const VecF z = rest * rest;
  VecF s = multiply_add(z, -1.9515295891e-4f, 8.3321608736e-3f);
  s = multiply_add(s, z, -1.6666654611e-1f);
  s = multiply_add(s * z, rest, rest);
  VecF c = multiply_add(z, 2.443315711809948e-5f, -1.388731625493765e-3f);
  c = multiply_add(c, z, 4.166664568298827e-2f);
  c = multiply_add(c, z * z, multiply_add(z, -0.5f, 1.0f));
  const VecI swap = (quadrant & 1) != 0;
  const VecU sine_sign = (VecU)(quadrant & 2) << 30, cosine_sign = (VecU)((quadrant + 1) & 2) << 30;
  store(sine, (VecF)((VecU)select(swap, c, s) ^ sine_sign));
  store(cosine, (VecF)((VecU)select(swap, s, c) ^ cosine_sign));
}

// Cosine and sine of the angles time * rate + shift. Every lane is computed as it would be alone: large angles beside
// it do not change it. Beyond 2^30, and for NaN and infinities, the library takes over.
static void sines(const float* time, float rate, float shift, float* cosine, float* sine) {
  VecI is_large[kTimes / EVKERNELS_LANES], some = {};
  for (int64_t n = 0; n < kTimes; n += EVKERNELS_LANES) {
    VecF rest;
    VecI quadrant;
    is_large[n / EVKERNELS_LANES] = reduce_small(load(time + n), rate, shift, rest, quadrant);
    some |= is_large[n / EVKERNELS_LANES];
    sine_of_rest(rest, quadrant, cosine + n, sine + n);
  }
  int32_t any = 0;
  for (int k = 0; k < EVKERNELS_LANES; ++k) any |= some[k];
  if (!any) return;
  float rest[kTimes], large_cosine[EVKERNELS_LANES], large_sine[EVKERNELS_LANES];
  int32_t quadrant[kTimes];
  reduce_large(time, rate, shift, rest, quadrant);
  for (int64_t n = 0; n < kTimes; n += EVKERNELS_LANES) {
    VecI turns;
    __builtin_memcpy(&turns, quadrant + n, sizeof turns);
    sine_of_rest(load(rest + n), turns, large_cosine, large_sine);
    const VecI large = is_large[n / EVKERNELS_LANES];
    store(sine + n, select(large, load(large_sine), load(sine + n)));
    store(cosine + n, select(large, load(large_cosine), load(cosine + n)));
  }
  for (int64_t n = 0; n < kTimes; ++n) {
    const double angle = (double)time[n] * rate + shift;
    if (__builtin_fabs(angle) <= kLargestAngle) continue;
    sine[n] = (float)__builtin_sin(angle);
    cosine[n] = (float)__builtin_cos(angle);
  }
}
static void sines(const double* time, double rate, double shift, double* cosine, double* sine) {
  for (int64_t n = 0; n < kTimes; ++n) {
    const double angle = multiply_add(time[n], rate, shift);
    sine[n] = __builtin_sin(angle);
    cosine[n] = __builtin_cos(angle);
  }
}

EVKERNELS_INLINE VecF where_less(VecF x, float bound, VecF a, VecF b) { return select(x < bound, a, b); }
EVKERNELS_INLINE double where_less(double x, double bound, double a, double b) { return x < bound ? a : b; }

// Rows 2 * (k - 1) and 2 * (k - 1) + 1 of a feature are the cosine and the sine of k times its angle. Each harmonic is
// composed of two of half its order, so that errors grow with the logarithm of the order.
template <class A>
static void harmonics(A* rows, int64_t count) {
  using V = typename Arithmetic<A>::Type;
  for (int64_t k = 2; k <= count; ++k) {
    const A *const low = rows + 2 * (k / 2 - 1) * kTimes, *const high = rows + 2 * (k - k / 2 - 1) * kTimes;
    A* const to = rows + 2 * (k - 1) * kTimes;
    for (int64_t n = 0; n < kTimes; n += Arithmetic<A>::kLanes) {
      const V c1 = load(low + n), s1 = load(low + kTimes + n), c2 = load(high + n), s2 = load(high + kTimes + n);
      store(to + n, multiply_add(c1, c2, -(s1 * s2)));
      store(to + kTimes + n, multiply_add(s1, c2, c1 * s2));
    }
  }
}

// From the middle of basis b to v, in intervals; the bases reach two to either side. Scaled first: in intervals the
// middles are exact.
template <class V, class A>
EVKERNELS_INLINE V distance_from_middle(V v, int64_t b, A intervals_per_unit) {
  return multiply_add(v, V{} + intervals_per_unit, V{} + (intervals_per_unit + 1 - b));
}

// Row 0 is tanh(v), the others are the cubic B-spline bases at v in their closed form: with d the distance to the
// middle of the basis in intervals, (4 - 6 d^2 + 3 d^3) / 6 below 1, (2 - d)^3 / 6 below 2.
template <class A>
static void spline_features(const A* argument, A* rows, int64_t bases) {
  using V = typename Arithmetic<A>::Type;
  constexpr int L = Arithmetic<A>::kLanes;
  const A intervals_per_unit = A(0.5) * (bases - 3);
  for (int64_t n = 0; n < kTimes; n += L) store(rows + n, tanh(load(argument + n)));
  for (int64_t b = 0; b < bases; ++b) {
    rows += kTimes;
    for (int64_t n = 0; n < kTimes; n += L) {
      const V d = magnitude(distance_from_middle(load(argument + n), b, intervals_per_unit));
      const V inner = multiply_add(multiply_add(d, A(0.5), V{} - A(1)), d * d, V{} + A(2.0 / 3));
      const V rest = where_less(d, A(2), A(2) - d, V{});
      store(rows + n, where_less(d, A(1), inner, rest * rest * rest * A(1.0 / 6)));
    }
  }
}

// The gradient at a feature's angle from those at its rows.
template <class A>
static void harmonics_backward(const A* rows, const A* d_rows, A* d_angle, int64_t count) {
  using V = typename Arithmetic<A>::Type;
  for (int64_t n = 0; n < kTimes; n += Arithmetic<A>::kLanes) {
    V sum = {};
    for (int64_t k = 1; k <= count; ++k) {
      const int64_t at = 2 * (k - 1) * kTimes + n;
      const V turned =
          multiply_add(load(rows + at), load(d_rows + at + kTimes), -(load(rows + at + kTimes) * load(d_rows + at)));
      sum = multiply_add(turned, V{} + A(k), sum);
    }
    store(d_angle + n, sum);
  }
}

template <class A>
static void spline_backward(const A* argument, const A* rows, const A* d_rows, A* d_argument, int64_t bases) {
  using V = typename Arithmetic<A>::Type;
  constexpr int L = Arithmetic<A>::kLanes;
  const A intervals_per_unit = A(0.5) * (bases - 3);
  V sums[kTimes / L] = {};
  for (int64_t b = 0; b < bases; ++b) {
    for (int64_t n = 0; n < kTimes; n += L) {
      const V x = distance_from_middle(load(argument + n), b, intervals_per_unit), d = magnitude(x);
      const V inner = multiply_add(d, A(1.5), V{} - A(2)) * x;
      const V rest = where_less(d, A(2), A(2) - d, V{});
      const V outer = rest * rest * where_less(x, A(0), V{} + A(0.5), V{} - A(0.5));
      V& sum = sums[n / L];
      sum = multiply_add(where_less(d, A(1), inner, outer), load(d_rows + (1 + b) * kTimes + n), sum);
    }
  }
  for (int64_t n = 0; n < kTimes; n += L) {
    const V tanh_v = load(rows + n), slope = (A(1) - tanh_v) * (A(1) + tanh_v);
    store(d_argument + n, multiply_add(sums[n / L], V{} + intervals_per_unit, load(d_rows + n) * slope));
  }
}
