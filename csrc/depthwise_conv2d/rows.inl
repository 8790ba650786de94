// What the loops of both layouts share: one plane's convolution as they see it, vectors that reach over the end of a
// row, filters in the order of the loops, activations of rows. Compiled once per instruction set.

#include "common/activations.inl"

template <class T>
using Wide = evkernels::Compute<T>;

constexpr int64_t kLargestFilter = 31;
// Output rows that are formed together if contiguous: each input row is loaded once for all of them.
constexpr int kBlock = 4;

EVKERNELS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
EVKERNELS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// One plane: contiguous [height][width], or [height][width][channels].
template <class T>
struct Plane {
  const T* x;
  int64_t height, width, out_width, channels, k, padding, dilation;
  const Wide<T>* filter;  // contiguous: [k * k]; otherwise [vector of channels][k * k][lanes]
  const Wide<T>* bias;    // null, or contiguous: one value; otherwise [vector of channels][lanes]

  // Rows and columns of the image that the filter spans.
  EVKERNELS_LOOP_BODY int64_t span() const { return (k - 1) * dilation + 1; }
};

// Keeps the compiler from loading v again, as an operand, for every product it takes part in: loads, above all
// unaligned ones, would be the bottleneck.
template <class V>
EVKERNELS_INLINE V in_register(V v) {
#if defined(__x86_64__)
  __asm__("" : "+v"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#endif
  return v;
}

// Vectors of channels; where they do not fill the last one it overlaps the one before. channels >= lanes.
template <class A>
EVKERNELS_INLINE int64_t channel_vectors(int64_t channels) {
  return (channels + Arithmetic<A>::kLanes - 1) / Arithmetic<A>::kLanes;
}
template <class A>
EVKERNELS_INLINE int64_t first_channel(int64_t vector, int64_t channels) {
  return smaller(vector * Arithmetic<A>::kLanes, channels - Arithmetic<A>::kLanes);
}

// The filter of one contiguous plane, or those of all channels, as Plane has them; `turned` by half a turn.
template <class T>
static void arrange_filter(const T* weight, int64_t channels, int64_t taps, bool turned, Wide<T>* to) {
  using A = Wide<T>;
  const int64_t lanes = channels == 1 ? 1 : Arithmetic<A>::kLanes;
  for (int64_t v = 0; v < (channels == 1 ? 1 : channel_vectors<A>(channels)); ++v) {
    const T* const from = weight + (channels == 1 ? 0 : first_channel<A>(v, channels) * taps);
    for (int64_t tap = 0; tap < taps; ++tap, to += lanes) {
      for (int64_t j = 0; j < lanes; ++j) to[j] = to_float(from[j * taps + (turned ? taps - 1 - tap : tap)]);
    }
  }
}

// Lanes begin <= j < end of a vector. Loads of the others are zero, and their memory is not touched.
template <class A>
struct Lanes {
  int64_t begin, end;

  Lanes() = default;
  EVKERNELS_LOOP_BODY Lanes(int64_t first, int64_t last) : begin(within(first)), end(within(last)) {}
  static EVKERNELS_LOOP_BODY int64_t within(int64_t lane) { return smaller(larger(lane, 0), Arithmetic<A>::kLanes); }
};
// Not inlined: these loops would be most of the code.
template <class T, class A>
static __attribute__((noinline)) typename Arithmetic<T>::Type load_lanes(const T* p, Lanes<A> lanes) {
  T buffer[Arithmetic<T>::kLanes] = {};
  for (int64_t j = lanes.begin; j < lanes.end; ++j) buffer[j] = p[j];
  return load(buffer);
}
template <class T, class A>
static __attribute__((noinline)) void store_lanes(T* p, typename Arithmetic<T>::Type v, Lanes<A> lanes) {
  T buffer[Arithmetic<T>::kLanes];
  store(buffer, v);
  for (int64_t j = lanes.begin; j < lanes.end; ++j) p[j] = buffer[j];
}
#if defined(__x86_64__) && EVKERNELS_LANES == 16
template <>
struct Lanes<float> {
  uint16_t mask;

  Lanes() = default;
  EVKERNELS_LOOP_BODY Lanes(int64_t first, int64_t last) : mask((uint16_t)(below(last) & ~below(first))) {}
  static EVKERNELS_LOOP_BODY uint32_t below(int64_t lane) { return (1u << (lane < 0 ? 0 : lane > 16 ? 16 : lane)) - 1; }
};
EVKERNELS_INLINE VecF load_lanes(const float* p, Lanes<float> lanes) {
  return (VecF)_mm512_maskz_loadu_ps(lanes.mask, p);
}
EVKERNELS_INLINE void store_lanes(float* p, VecF v, Lanes<float> lanes) {
  _mm512_mask_storeu_ps(p, lanes.mask, (__m512)v);
}
template <class T>
EVKERNELS_INLINE void store_lanes(T* p, VecF v, Lanes<float> lanes) {
  T buffer[16];
  store(buffer, v);
  _mm256_mask_storeu_epi16(p, lanes.mask, _mm256_loadu_si256((const __m256i*)buffer));
}
EVKERNELS_INLINE VecF load_lanes(const BFloat16* p, Lanes<float> lanes) {
  const __m256i u = _mm256_maskz_loadu_epi16(lanes.mask, p);
  return (VecF)(__builtin_convertvector((VecU16)u, VecI) << 16);
}
EVKERNELS_INLINE VecF load_lanes(const Half* p, Lanes<float> lanes) {
  return (VecF)_mm512_maskz_cvtph_ps(kAllLanes, _mm256_maskz_loadu_epi16(lanes.mask, p));
}
#elif defined(__x86_64__) && EVKERNELS_LANES == 8
EVKERNELS_INLINE __m256i mask_of(Lanes<float> lanes) {
  const VecI lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return (__m256i)((lane >= (int32_t)lanes.begin) & (lane < (int32_t)lanes.end));
}
EVKERNELS_INLINE VecF load_lanes(const float* p, Lanes<float> lanes) {
  return (VecF)_mm256_maskload_ps(p, mask_of(lanes));
}
EVKERNELS_INLINE void store_lanes(float* p, VecF v, Lanes<float> lanes) {
  _mm256_maskstore_ps(p, mask_of(lanes), (__m256)v);
}
#endif

// Two vectors lane by lane in turns, and every second lane of two vectors, in any order: as in memory after in_order,
// which is its own inverse.
#if EVKERNELS_LANES == 16
#define EVKERNELS_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define EVKERNELS_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define EVKERNELS_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define EVKERNELS_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif EVKERNELS_LANES == 8
// One instruction each; in order they would take three, for every column of a filter.
#define EVKERNELS_EVEN 0, 2, 8, 10, 4, 6, 12, 14
#define EVKERNELS_ODD 1, 3, 9, 11, 5, 7, 13, 15
#define EVKERNELS_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define EVKERNELS_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define EVKERNELS_EVEN 0, 2, 4, 6
#define EVKERNELS_ODD 1, 3, 5, 7
#define EVKERNELS_LOW 0, 4, 1, 5
#define EVKERNELS_HIGH 2, 6, 3, 7
#endif
EVKERNELS_INLINE VecF even_lanes(VecF a, VecF b) { return __builtin_shufflevector(a, b, EVKERNELS_EVEN); }
EVKERNELS_INLINE VecF odd_lanes(VecF a, VecF b) { return __builtin_shufflevector(a, b, EVKERNELS_ODD); }
#if EVKERNELS_LANES == 8
EVKERNELS_INLINE VecF in_order(VecF a) { return __builtin_shufflevector(a, a, 0, 1, 4, 5, 2, 3, 6, 7); }
#else
EVKERNELS_INLINE VecF in_order(VecF a) { return a; }
#endif
EVKERNELS_INLINE double in_order(double a) { return a; }
EVKERNELS_INLINE VecF interleaved_low(VecF a, VecF b) { return __builtin_shufflevector(a, b, EVKERNELS_LOW); }
EVKERNELS_INLINE VecF interleaved_high(VecF a, VecF b) { return __builtin_shufflevector(a, b, EVKERNELS_HIGH); }
EVKERNELS_INLINE double even_lanes(double a, double) { return a; }
EVKERNELS_INLINE double odd_lanes(double, double b) { return b; }
EVKERNELS_INLINE double interleaved_low(double a, double) { return a; }
EVKERNELS_INLINE double interleaved_high(double, double b) { return b; }
#undef EVKERNELS_EVEN
#undef EVKERNELS_ODD
#undef EVKERNELS_LOW
#undef EVKERNELS_HIGH

// to[j] = f(from[j], j); they may be the same. The end of a row is a vector of its own.
template <class T, class A, class F>
EVKERNELS_INLINE void map_row(const A* from, T* to, int64_t count, const F& f) {
  constexpr int kLanes = Arithmetic<A>::kLanes;
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) store(to + j, f(load(from + j)));
  if (j == count) return;
  const Lanes<A> rest(0, count - j);
  store_lanes(to + j, f(load_lanes(from + j, rest)), rest);
}

// to = from, in the type of the computation.
template <class T>
static void widen(const T* from, Wide<T>* to, int64_t count) {
  constexpr int kLanes = Arithmetic<Wide<T>>::kLanes;
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) store(to + j, load(from + j));
  if (j == count) return;
  const Lanes<Wide<T>> rest(0, count - j);
  store_lanes(to + j, load_lanes(from + j, rest), rest);
}

// y = activation(pre), rounded; y may be pre.
template <class T, class A>
static void activate_row(Activation kind, const A* pre, T* y, int64_t count) {
  using V = typename Arithmetic<A>::Type;
  with_activation(kind, [&](auto constant) __attribute__((always_inline)) {
    map_row(pre, y, count, [](V v) __attribute__((always_inline)) { return activate<decltype(constant)::value>(v); });
  });
}

template <Activation kind, class T, class A>
static void activation_gradient_row(A* pre, const T* d_y, int64_t count) {
  constexpr int kLanes = Arithmetic<A>::kLanes;
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    store(pre + j, activation_gradient<kind>(load(pre + j), load(d_y + j)));
  }
  if (j == count) return;
  const Lanes<A> rest(0, count - j);
  store_lanes(pre + j, activation_gradient<kind>(load_lanes(pre + j, rest), load_lanes(d_y + j, rest)), rest);
}

// pre = activation'(pre) * d_y.
template <class T, class A>
static void activation_gradient_row(Activation kind, A* pre, const T* d_y, int64_t count) {
  with_activation(kind, [&](auto constant) __attribute__((always_inline)) {
    if (kind != Activation::kNone) activation_gradient_row<decltype(constant)::value>(pre, d_y, count);
  });
}
