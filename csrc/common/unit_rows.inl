// Rows of unit length and their gradient, and steps across the lanes of a vector. Included by loops.inl files after
// rows.inl and activations.inl inside each instruction set's namespace; includes nothing itself.

EVKERNELS_INLINE float larger(float a, float b) { return a > b ? a : b; }
EVKERNELS_INLINE double larger(double a, double b) { return a > b ? a : b; }
EVKERNELS_INLINE VecF larger(VecF a, VecF b) { return select(a > b, a, b); }
EVKERNELS_INLINE double largest_lane(double v) { return v; }
EVKERNELS_INLINE float largest_lane(VecF v) {
  float top = v[0];
  for (int k = 1; k < EVKERNELS_LANES; ++k) top = larger(v[k], top);
  return top;
}
EVKERNELS_INLINE double sum_of_lanes(double v) { return v; }
EVKERNELS_INLINE float sum_of_lanes(VecF v) {
  float sum = v[0];
  for (int k = 1; k < EVKERNELS_LANES; ++k) sum += v[k];
  return sum;
}
EVKERNELS_INLINE double exp_of(double x) { return exp(x); }
EVKERNELS_INLINE float exp_of(float x) { return exp(splat(x))[0]; }

// The sum of f(at, element) over a row of `size` elements, `at` reading a whole or a partial vector. Two sums take
// turns so that additions overlap.
template <class T, class F>
EVKERNELS_INLINE Compute<T> sum_over_row(int64_t size, const F& f) {
  using V = typename Arithmetic<T>::Type;
  constexpr int kLanes = Arithmetic<T>::kLanes;
  V even = {}, odd = {};
  int64_t e = 0;
  for (; e + 2 * kLanes <= size; e += 2 * kLanes) {
    even += f(WholeVector{}, e);
    odd += f(WholeVector{}, e + kLanes);
  }
  for (; e + kLanes <= size; e += kLanes) even += f(WholeVector{}, e);
  if (e < size) odd += f(PartialVector{size - e}, e);
  return sum_of_lanes(even + odd);
}

template <class A>
EVKERNELS_INLINE A square_root(A x) {
  return sizeof(A) == 8 ? (A)__builtin_sqrt((double)x) : (A)__builtin_sqrtf((float)x);
}

// Lengths below this count as this, as in torch.nn.functional.normalize.
constexpr double kSmallestLength = 1e-12;

// 1 over the length of a row.
template <class T>
EVKERNELS_INLINE Compute<T> inverse_length(const T* x, int64_t size) {
  using A = Compute<T>;
  const A square = sum_over_row<T>(size, [&](auto at, int64_t e) EVKERNELS_LOOP_BODY {
    const auto v = at.read(x + e);
    return v * v;
  });
  return 1 / larger((A)kSmallestLength, square_root(square));
}

// Rows of x to unit length.
template <class T, class A>
static void unit_rows(const T* x, A* p, A* inverses, int64_t size, int64_t begin, int64_t end) {
  using V = typename Arithmetic<T>::Type;
  constexpr int kLanes = Arithmetic<T>::kLanes;
  for (int64_t i = begin; i < end; ++i) {
    const T* const from = x + i * size;
    A* const to = p + i * size;
    inverses[i] = inverse_length(from, size);
    const V factor = V{} + inverses[i];
    for_each_vector<kLanes>(size, 0, size, [&](auto at, int64_t, int64_t e) EVKERNELS_LOOP_BODY {
      at.write(to + e, at.read(from + e) * factor);
    });
  }
}

// From `factor` times the gradient d_p of unit rows p to the gradient of the rows they were made of, which may be in
// d_p's place. dots[i] is the product of d_p's and p's rows, without the factor.
template <class T, class A>
static void unit_rows_backward(const A* d_p, const A* p, const A* inverses, T* d_x, A* dots, A factor, int64_t size,
                               int64_t begin, int64_t end) {
  using V = typename Arithmetic<A>::Type;
  constexpr int kLanes = Arithmetic<A>::kLanes;
  for (int64_t i = begin; i < end; ++i) {
    const A *const from = d_p + i * size, *const unit = p + i * size;
    T* const to = d_x + i * size;
    dots[i] = sum_over_row<A>(
        size, [&](auto at, int64_t e) EVKERNELS_LOOP_BODY { return at.read(from + e) * at.read(unit + e); });
    // A row that is too short was divided by a constant.
    const V along = V{} + (inverses[i] * (A)kSmallestLength < 1 ? dots[i] : 0), scale = V{} + factor * inverses[i];
    for_each_vector<kLanes>(size, 0, size, [&](auto at, int64_t, int64_t e) EVKERNELS_LOOP_BODY {
      at.write(to + e, (at.read(from + e) - along * at.read(unit + e)) * scale);
    });
  }
}
