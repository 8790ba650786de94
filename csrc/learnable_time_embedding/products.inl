// The three products of a block: outputs from features, gradients of features from those of outputs, gradients of the
// weights from both. Each keeps a tile of sums in registers. Included by loops.inl.

// Rows of a tile. With two vectors each: half of the 32 or 16 registers.
constexpr int kTile = EVKERNELS_LANES == 16 ? 8 : 4;

// Unlike 0 + x, x - 0 is x for every x, so that nothing remains of it but the broadcast.
EVKERNELS_INLINE VecF broadcast(VecF, float x) { return x - VecF{}; }
EVKERNELS_INLINE double broadcast(double, double x) { return x; }

// Terms that one register sums before it is added to the total, with what rounding took from the total before. Features
// of low rates are the same at every timestamp, and so is the rounding of their sum, which the gradients of norm and
// scale, sums over all timestamps, multiply. Sums of 300 in one go, and runs of 32 with no correction, broke the error
// bound of the tests; runs of 16 with one cost as much as those.
constexpr int64_t kRun = 16;

// to[r][n] = first[r] + sum over m < count of weight[m * down + r * right] * from[m][n], for kTile rows r.
template <class A>
EVKERNELS_INLINE void product_tile(const A* from, int64_t count, const A* weight, int64_t down, int64_t right,
                                   const A* first, A* to) {
  using V = typename Arithmetic<A>::Type;
  constexpr int L = Arithmetic<A>::kLanes;
  for (int64_t n = 0; n < kTimes; n += 2 * L) {
    V lost[kTile][2] = {};
    for (int64_t run = 0; run == 0 || run < count; run += kRun) {
      const int64_t end = count - run < kRun ? count : run + kRun;
      V sums[kTile][2] = {};
      for (int64_t m = run; m < end; ++m) {
        const V left_vector = load(from + m * kTimes + n), right_vector = load(from + m * kTimes + n + L);
        const A* const w = weight + m * down;
#pragma GCC unroll 8
        for (int r = 0; r < kTile; ++r) {
          const V factor = broadcast(V{}, w[r * right]);
          sums[r][0] = multiply_add(factor, left_vector, sums[r][0]);
          sums[r][1] = multiply_add(factor, right_vector, sums[r][1]);
        }
      }
      for (int r = 0; r < kTile; ++r) {
        A* const total = to + r * kTimes + n;
        for (int k = 0; k < 2; ++k) {
          const V before = run ? load(total + k * L) : broadcast(V{}, first ? first[r] : A(0));
          const V added = sums[r][k] + lost[r][k], after = before + added;
          if (end < count) lost[r][k] = added - (after - before);
          store(total + k * L, after);
        }
      }
    }
  }
}

// y[o] = bias[o] + sum over rows of weight[row][o] * features[row]; writes padded(outputs) rows. `bias` is padded too.
template <class A>
static void mix(const A* features, int64_t rows, const A* weight, const A* bias, int64_t outputs, A* y) {
  const int64_t width = padded(outputs);
  for (int64_t o = 0; o < outputs; o += kTile)
    product_tile(features, rows, weight + o, width, 1, bias ? bias + o : nullptr, y + o * kTimes);
}

// d_features[row] = sum over o of weight[row][o] * d_y[o].
template <class A>
static void mix_backward(const A* d_y, int64_t outputs, const A* weight, int64_t rows, A* d_features) {
  const int64_t width = padded(outputs);
  for (int64_t row = 0; row < rows; row += kTile)
    product_tile<A>(d_y, outputs, weight + row * width, 1, width, nullptr, d_features + row * kTimes);
}

// sums[row][o] += sum over n of features[row][n] * d_y[n][o]: here the gradients lie with the outputs of one timestamp
// side by side, padded.
template <class A>
static void add_weight_gradient(const A* features, int64_t rows, const A* d_y, int64_t outputs, A* sums) {
  using V = typename Arithmetic<A>::Type;
  constexpr int L = Arithmetic<A>::kLanes, kRows = 8;
  const int64_t width = padded(outputs);
  for (int64_t row = 0; row < rows; row += kRows) {
    for (int64_t o = 0; o < outputs; o += L) {
      V tile[kRows];
      for (int r = 0; r < kRows; ++r) tile[r] = V{};
      for (int64_t n = 0; n < kTimes; ++n) {
        const V d = load(d_y + n * width + o);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r)
          tile[r] = multiply_add(broadcast(V{}, features[(row + r) * kTimes + n]), d, tile[r]);
      }
      for (int r = 0; r < kRows; ++r) {
        A* const to = sums + (row + r) * width + o;
        store(to, load(to) + tile[r]);
      }
    }
  }
}
