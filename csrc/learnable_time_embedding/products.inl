// The three products of a run of features: what they add to the outputs, gradients of features from those of outputs,
// gradients of the weights from both. Each keeps a tile of sums in registers. Included by loops.inl.
//
// A list holds the rows that take part, because at a timestamp only four bases of a spline are not zero, and in a block
// of them only few more. A row's terms are exact zeros otherwise: leaving them out changes no bit.

// Outputs of a tile. With two vectors each: half of the 32 or 16 registers.
constexpr int kTile = EVKERNELS_LANES == 16 ? 8 : 4;
// Rows of a tile of gradients, of two vectors each.
constexpr int kRowTile = EVKERNELS_LANES == 16 ? 10 : 5;

// Unlike 0 + x, x - 0 is x for every x, so that nothing remains of it but the broadcast.
EVKERNELS_INLINE VecF broadcast(VecF, float x) { return x - VecF{}; }
EVKERNELS_INLINE double broadcast(double, double x) { return x; }

// y[o] += sum over listed rows of weight[row][o] * features[row]; `lost` is what rounding took from y so far. Writes
// padded(outputs) rows of both.
template <class A>
static void add_products(const A* features, const int32_t* list, int64_t count, const A* weight, int64_t outputs, A* y,
                         A* lost) {
  using V = typename Arithmetic<A>::Type;
  constexpr int L = Arithmetic<A>::kLanes;
  const int64_t width = padded(outputs);
  for (int64_t o = 0; o < outputs; o += kTile) {
    for (int64_t n = 0; n < kTimes; n += 2 * L) {
      V sums[kTile][2];
#pragma GCC unroll 8
      for (int r = 0; r < kTile; ++r)
        for (int k = 0; k < 2; ++k) sums[r][k] = load(lost + (o + r) * kTimes + n + k * L);
      for (int64_t m = 0; m < count; ++m) {
        const A *const row = features + list[m] * kTimes + n, *const w = weight + list[m] * width + o;
        const V left = load(row), right = load(row + L);
#pragma GCC unroll 8
        for (int r = 0; r < kTile; ++r) {
          const V factor = broadcast(V{}, w[r]);
          sums[r][0] = multiply_add(factor, left, sums[r][0]);
          sums[r][1] = multiply_add(factor, right, sums[r][1]);
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kTile; ++r) {
        for (int k = 0; k < 2; ++k) {
          const int64_t at = (o + r) * kTimes + n + k * L;
          const V before = load(y + at), after = before + sums[r][k];
          store(lost + at, sums[r][k] - (after - before));
          store(y + at, after);
        }
      }
    }
  }
}

// d_rows[m] = sum over o of weight[list[m]][o] * d_y[o]; the list is filled up to whole tiles.
template <class A>
static void row_gradients(const A* d_y, int64_t outputs, const A* weight, const int32_t* list, int64_t count,
                          A* d_rows) {
  using V = typename Arithmetic<A>::Type;
  constexpr int L = Arithmetic<A>::kLanes;
  const int64_t width = padded(outputs);
  for (int64_t m = 0; m < count; m += kRowTile) {
    const A* w[kRowTile];
    for (int r = 0; r < kRowTile; ++r) w[r] = weight + list[m + r] * width;
    for (int64_t n = 0; n < kTimes; n += 2 * L) {
      V sums[kRowTile][2] = {};
      for (int64_t o = 0; o < outputs; ++o) {
        const V left = load(d_y + o * kTimes + n), right = load(d_y + o * kTimes + n + L);
#pragma GCC unroll 10
        for (int r = 0; r < kRowTile; ++r) {
          const V factor = broadcast(V{}, w[r][o]);
          sums[r][0] = multiply_add(factor, left, sums[r][0]);
          sums[r][1] = multiply_add(factor, right, sums[r][1]);
        }
      }
#pragma GCC unroll 10
      for (int r = 0; r < kRowTile; ++r)
        for (int k = 0; k < 2; ++k) store(d_rows + (m + r) * kTimes + n + k * L, sums[r][k]);
    }
  }
}

// sums[row][o] += sum over n of features[row][n] * d_y[n][o] for listed rows: here the gradients lie with the outputs
// of one timestamp side by side, padded.
template <class A>
static void add_weight_gradients(const A* features, const int32_t* list, int64_t count, const A* d_y, int64_t outputs,
                                 A* sums) {
  using V = typename Arithmetic<A>::Type;
  constexpr int L = Arithmetic<A>::kLanes;
  const int64_t width = padded(outputs);
  for (int64_t m = 0; m < count; m += kRows) {
    const A* row[kRows];
    for (int r = 0; r < kRows; ++r) row[r] = features + list[m + r] * kTimes;
    for (int64_t o = 0; o < outputs; o += L) {
      V tile[kRows] = {};
      for (int64_t n = 0; n < kTimes; ++n) {
        const V d = load(d_y + n * width + o);
#pragma GCC unroll 10
        for (int r = 0; r < kRows; ++r) tile[r] = multiply_add(broadcast(V{}, row[r][n]), d, tile[r]);
      }
#pragma GCC unroll 10
      for (int r = 0; r < kRows; ++r) {
        A* const to = sums + list[m + r] * width + o;
        store(to, load(to) + tile[r]);
      }
    }
  }
}
