// Several vectors that take each step of a computation together. Included inside each instruction set's namespace;
// includes nothing itself.
//
// The exponential of a gate is a chain of twenty operations of four cycles each, of which a processor begins two in a
// cycle. From one vector to the next it waits for results most of the time: it does not look far enough ahead to find
// the next vectors' operations. Side by side, chains fill each other's gaps: lstm_gates on a map in the cache, with 2,
// 4, 6 and 8 vectors, takes 0.86, 0.77, 0.69 and 0.70 of the time of one in AVX-512's forward pass, 0.79, 0.68, 0.64
// and 0.64 in its backward pass, and 0.90, 0.81, 0.76 and 0.91 in AVX2's forward pass.

template <class V, int K>
struct Interleaved {
  V v[K];
};

// The k-th vector of an argument of `each`; one vector or number is the same for all.
template <class V, int K>
EVKERNELS_INLINE V vector_of(const Interleaved<V, K>& a, int k) {
  return a.v[k];
}
EVKERNELS_INLINE VecF vector_of(VecF a, int) { return a; }
EVKERNELS_INLINE double vector_of(double a, int) { return a; }
EVKERNELS_INLINE float vector_of(float a, int) { return a; }

// f of one vector, or of each of K and the vectors beside it.
template <class F, class... Others>
EVKERNELS_INLINE VecF each(const F& f, VecF a, Others... others) {
  return f(a, others...);
}
template <class F, class V, int K, class... Others>
EVKERNELS_INLINE Interleaved<V, K> each(const F& f, const Interleaved<V, K>& a, const Others&... others) {
  Interleaved<V, K> result;
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) result.v[k] = f(a.v[k], vector_of(others, k)...);
  return result;
}

template <class V, int K, class B>
EVKERNELS_INLINE Interleaved<V, K> operator+(const Interleaved<V, K>& a, const B& b) {
  return each([](V x, auto y) EVKERNELS_LOOP_BODY { return x + y; }, a, b);
}
template <class V, int K, class B>
EVKERNELS_INLINE Interleaved<V, K> operator-(const Interleaved<V, K>& a, const B& b) {
  return each([](V x, auto y) EVKERNELS_LOOP_BODY { return x - y; }, a, b);
}
template <class V, int K, class B>
EVKERNELS_INLINE Interleaved<V, K> operator*(const Interleaved<V, K>& a, const B& b) {
  return each([](V x, auto y) EVKERNELS_LOOP_BODY { return x * y; }, a, b);
}
template <class V, int K>
EVKERNELS_INLINE Interleaved<V, K> operator+(float a, const Interleaved<V, K>& b) {
  return b + a;
}
template <class V, int K>
EVKERNELS_INLINE Interleaved<V, K> operator-(float a, const Interleaved<V, K>& b) {
  return each([a](V x) EVKERNELS_LOOP_BODY { return a - x; }, b);
}
template <class V, int K, class B, class C>
EVKERNELS_INLINE Interleaved<V, K> multiply_add(const Interleaved<V, K>& a, const B& b, const C& c) {
  return each([](V x, auto y, auto z) EVKERNELS_LOOP_BODY { return multiply_add(x, y, z); }, a, b, c);
}

// Column n of K rows of sums.
template <class V, int K, int columns>
EVKERNELS_INLINE Interleaved<V, K> gate_of(const V (&sums)[K][columns], int n) {
  Interleaved<V, K> result;
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) result.v[k] = sums[k][n];
  return result;
}

// K whole vectors for the loop bodies of common/rows.inl.
template <int K>
struct WholeVectors {
  static constexpr int kVectors = K;
  template <class T>
  using Value = Interleaved<typename Arithmetic<T>::Type, K>;
  template <class T>
  EVKERNELS_LOOP_BODY Value<T> read(const T* p) const {
    Value<T> result;
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) result.v[k] = load(p + k * Arithmetic<T>::kLanes);
    return result;
  }
  template <class T>
  EVKERNELS_LOOP_BODY void write(T* p, const Value<T>& value) const {
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) store(p + k * Arithmetic<T>::kLanes, value.v[k]);
  }
};

// How loops of gates read T: four vectors side by side, which with AVX-512 is a pixel of 64 channels. One in float64,
// whose functions are the standard library's, and where registers are small.
template <class T>
using GateVectors = WholeVectors<sizeof(T) == 8 || EVKERNELS_LANES == 4 ? 1 : 4>;
