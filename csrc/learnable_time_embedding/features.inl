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

EVKERNELS_INLINE bool any(VecI mask) {
#if defined(__x86_64__) && EVKERNELS_LANES == 16
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__x86_64__) && EVKERNELS_LANES == 8
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  int32_t found = 0;
  for (int k = 0; k < EVKERNELS_LANES; ++k) found |= mask[k];
  return found != 0;
#endif
}
EVKERNELS_INLINE bool any(bool found) { return found; }
EVKERNELS_INLINE VecF magnitude(VecF x) { return (VecF)((VecI)x & 0x7fffffff); }
EVKERNELS_INLINE double magnitude(double x) { return __builtin_fabs(x); }

// The angle time * rate + shift and what rounding took from it.
EVKERNELS_INLINE VecF angle_of(VecF time, float rate, float shift, VecF& rest) {
  // Adding zero in the same instruction: nothing is left that a compiler could fuse with the sum below.
  const VecF product = multiply_add(time, rate, VecF{}), product_rest = multiply_add(time, splat(rate), -product);
  const VecF angle = product + shift, added = angle - product;
  rest = ((product - (angle - added)) + (shift - added)) + product_rest;
  return angle;
}

// The angles time * rate + shift reduced to [-pi/4, pi/4] and a whole number of quarter turns. Angles and reduction are
// exact to twice the bits of a float, so that large angles cost nothing extra, and their rounding, which the gradients
// of high harmonics multiply by their order squared, does not count. Returns which lanes are not such small angles.
EVKERNELS_INLINE VecI reduce_small(VecF time, float rate, float shift, VecF& rest, VecI& quadrant) {
  VecF angle_rest;
  const VecF angle = angle_of(time, rate, shift, angle_rest);
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
[[maybe_unused]] static void sines(const float* time, float rate, float shift, float* cosine, float* sine) {
  VecI is_large[kTimes / EVKERNELS_LANES], some = {};
  for (int64_t n = 0; n < kTimes; n += EVKERNELS_LANES) {
    VecF rest;
    VecI quadrant;
    is_large[n / EVKERNELS_LANES] = reduce_small(load(time + n), rate, shift, rest, quadrant);
    some |= is_large[n / EVKERNELS_LANES];
    sine_of_rest(rest, quadrant, cosine + n, sine + n);
  }
  if (!any(some)) return;
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
[[maybe_unused]] static void sines(const double* time, double rate, double shift, double* cosine, double* sine) {
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

EVKERNELS_INLINE VecI is_nonzero(VecF x) { return x != 0.0f; }
EVKERNELS_INLINE bool is_nonzero(double x) { return x != 0.0; }
EVKERNELS_INLINE float lane(VecF x, int k) { return x[k]; }
EVKERNELS_INLINE double lane(double x, int) { return x; }
EVKERNELS_INLINE VecF where_equal(VecF x, float y, VecF a, VecF b) { return select(x == y, a, b); }
EVKERNELS_INLINE double where_equal(double x, double y, double a, double b) { return x == y ? a : b; }
EVKERNELS_INLINE VecF rounded_down(VecF x) {
  const VecF whole = __builtin_convertvector(__builtin_convertvector(x, VecI), VecF);
  return whole - select(whole > x, splat(1.0f), VecF{});
}
EVKERNELS_INLINE double rounded_down(double x) { return __builtin_floor(x); }

// Where arguments lie on the grid of a spline: interval j, counted from -1 on, and the place f in it, 0 to 1. There
// only the cubic bases j to j + 3 are not zero. Beyond their support, and for NaN, j is such that none of them exists.
template <class V>
struct Places {
  V interval, f;
};
template <class V, class A>
EVKERNELS_INLINE Places<V> places_of(V argument, A intervals) {
  const A half = A(0.5) * intervals;
  V x = multiply_add(argument, V{} + half, V{} + half);
  x = where_less(x, intervals + 3, x, V{} + (intervals + 3));
  x = where_less(-x, A(4), x, V{} - A(4));
  const V interval = rounded_down(x);
  // Not x - interval, which would have rounded in x.
  return {interval, multiply_add(argument, V{} + half, half - interval)};
}

// values[k] wherever basis b is the k-th of its interval's four, 0 elsewhere.
template <class V, class A>
EVKERNELS_INLINE V basis_at(V interval, A b, const V (&values)[4]) {
  V value = {};
  for (int k = 0; k < 4; ++k) value = where_equal(interval, b - k, values[k], value);
  return value;
}

// Row 0 is tanh(v), the others are the cubic B-spline bases at v in their closed form. Only those that are not zero
// everywhere are written; they and row 0 are listed, `first` being the number of row 0. Returns the end of the list.
template <class A>
static int32_t* spline_features(const A* argument, A* rows, int64_t bases, int64_t first, int32_t* list) {
  using V = typename Arithmetic<A>::Type;
  constexpr int L = Arithmetic<A>::kLanes, kVectors = kTimes / L;
  V interval[kVectors], values[kVectors][4];
  auto differs = is_nonzero(V{});
  for (int64_t k = 0; k < kVectors; ++k) {
    const V v = load(argument + k * L);
    store(rows + k * L, tanh(v));
    const auto place = places_of(v, A(bases - 3));
    const V f = place.f, g = A(1) - f, f2 = f * f, g2 = g * g;
    interval[k] = place.interval;
    differs |= is_nonzero(interval[k] - lane(interval[0], 0));
    values[k][0] = g2 * g * A(1.0 / 6);
    values[k][1] = multiply_add(multiply_add(f, V{} + A(0.5), V{} - A(1)), f2, V{} + A(2.0 / 3));
    values[k][2] = multiply_add(multiply_add(g, V{} + A(0.5), V{} - A(1)), g2, V{} + A(2.0 / 3));
    values[k][3] = f2 * f * A(1.0 / 6);
  }
  *list++ = (int32_t)first;
  if (!any(differs)) {
    // Often: features of low rates, neighbouring times.
    const int64_t j = (int64_t)lane(interval[0], 0);
    for (int64_t b = j < 0 ? 0 : j; b <= j + 3 && b < bases; ++b) {
      for (int64_t k = 0; k < kVectors; ++k) store(rows + (1 + b) * kTimes + k * L, values[k][b - j]);
      *list++ = (int32_t)(first + 1 + b);
    }
    return list;
  }
  for (int64_t b = 0; b < bases; ++b) {
    auto found = is_nonzero(V{});
    for (int64_t k = 0; k < kVectors; ++k) {
      const V basis = basis_at(interval[k], A(b), values[k]);
      found |= is_nonzero(basis);
      store(rows + (1 + b) * kTimes + k * L, basis);
    }
    if (any(found)) *list++ = (int32_t)(first + 1 + b);
  }
  return list;
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

// The gradient at a spline's argument from those at its listed rows, of which there are `count`: tanh, then bases.
template <class A>
static void spline_backward(const A* argument, const A* tanh_row, const int32_t* list, int64_t count, const A* d_rows,
                            A* d_argument, int64_t bases) {
  using V = typename Arithmetic<A>::Type;
  const A intervals = A(bases - 3);
  for (int64_t n = 0; n < kTimes; n += Arithmetic<A>::kLanes) {
    const auto place = places_of(load(argument + n), intervals);
    const V f = place.f, g = A(1) - f;
    const V slopes[4] = {g * g * A(-0.5), multiply_add(f, V{} + A(1.5), V{} - A(2)) * f,
                         multiply_add(g, V{} + A(-1.5), V{} + A(2)) * g, f * f * A(0.5)};
    V sum = {};
    for (int64_t m = 1; m < count; ++m) {
      const V slope = basis_at(place.interval, A(list[m] - list[0] - 1), slopes);
      sum = multiply_add(slope, load(d_rows + m * kTimes + n), sum);
    }
    const V tanh_v = load(tanh_row + n), slope = (A(1) - tanh_v) * (A(1) + tanh_v);
    store(d_argument + n, multiply_add(sum, V{} + A(0.5) * intervals, load(d_rows + n) * slope));
  }
}
