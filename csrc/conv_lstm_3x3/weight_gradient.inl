// The gradient of a 3x3 convolution's weight by Winograd's F(2x2, 3x3), turned around: with the gradient g of a square
// of 2x2 pixels and its 4x4 surroundings d, d_w = G^T [sum over squares of (A g A^T) . (B^T d B)] G, 16 products for
// each pair of channels instead of 36.
//
// A chunk of squares at a time: both are transformed to [16][square][channel]; then each of the 16 places is a matrix
// product over the chunk's squares, in a register block of a few input channels by up to kGradientVectors vectors of
// output channels, which is added to the sums of all chunks before: two levels of sums, a tenth of the error of one.
// Threads share the squares of a chunk, then the places and panels; results do not depend on them. Products leave to
// the two transforms a fifth to a half of the time, most where channels are few.
//
// On one thread of a Zen 3 direct sums, a vector of input channels by the three taps of a row in the register block,
// took at least 1.3 times as long for 24 or 48 input channels and 1.5 to 1.7 times for 96 or 192, though they ran as
// fast as a large matrix product. PyTorch's library takes 1.2 to 1.5 times as long as those on contiguous maps, to
// which these would have to be copied, and 2.3 to 6 times in channels_last. With AVX-512 it takes 1.3 to 1.75 times as
// long as this file in channels_last from 24 channels each way on; with fewer the library is used (ops/library.py).

// Vectors of output channels of a panel.
constexpr int kGradientVectors = EVKERNELS_LANES == 16 ? 4 : 2;
// Input channels of a register block beside so many of them. With AVX-512 they divide a vector, so that no block
// computes more than there is: 0.8 to 0.95 of the time of kMostSums / vectors.
template <int vectors>
constexpr int kGradientRows = EVKERNELS_LANES == 16 ? (vectors == 3 ? 8 : 16 / vectors) : kMostSums / vectors;

template <class R>
struct GradientSizes {
  static constexpr int64_t kLanes = Arithmetic<R>::kLanes;
  int64_t columns[2];       // of either input, in whole vectors
  int64_t rows;             // of the sums: all columns, in whole register blocks
  int64_t vectors, panels;  // of output channels
  int64_t chunk;            // squares
  // From a square to the next and from a place to the next, of the transformed inputs and gradients.
  int64_t input_square, input_place, grad_square, grad_place;

  EVKERNELS_LOOP_BODY explicit GradientSizes(const WinogradShape& s) {
    for (int k = 0; k < 2; ++k) columns[k] = round_up(s.inputs[k], kLanes);
    const int64_t input_row = columns[0] + columns[1];
    rows = round_up(input_row, kGradientRows<1>);
    vectors = (s.channels + kLanes - 1) / kLanes;
    panels = (vectors + kGradientVectors - 1) / kGradientVectors;
    const int64_t grad_row = vectors * kLanes;
    // Chunks of nearly one size: they fill half of a second-level cache, or are so long that their sums need not wait
    // to be read and written.
    const int64_t fitting = (int64_t{4} << 10) / (input_row + grad_row);
    const int64_t most = fitting < 64 ? 64 : smaller(fitting, 256);
    const int64_t count = s.maps.squares(), chunks = (count + most - 1) / most;
    chunk = (count + chunks - 1) / chunks;
    // Of few channels a square's 16 places lie side by side, so that they are written in order: 1.35 times as fast with
    // 24 and 32 channels, 0.6 times with 192 and 256. What is added spreads the sets of a cache.
    const bool together = input_row + grad_row <= 128;
    input_place = together ? input_row : chunk * (input_row + kLanes);
    input_square = together ? 16 * input_row + kLanes : input_row + kLanes;
    grad_place = together ? grad_row : chunk * (grad_row + kLanes);
    grad_square = together ? 16 * grad_row + kLanes : grad_row + kLanes;
  }
  // Elements; a register block reads beyond the last row.
  EVKERNELS_LOOP_BODY int64_t inputs_size() const { return 16 * chunk * (rows + kLanes) + kMostRows; }
  EVKERNELS_LOOP_BODY int64_t grads_size() const { return 16 * chunk * (vectors + 1) * kLanes; }
  EVKERNELS_LOOP_BODY int64_t sums_place() const { return vectors * kLanes * rows; }
};

// Zeros where a register block reads beyond what is written: leftovers of other computations may be subnormal numbers,
// see common/workspace.h.
template <class R>
static void gradient_clear(R* buffer, const WinogradShape& s) {
  const GradientSizes<R> sizes(s);
  if (sizes.rows > sizes.columns[0] + sizes.columns[1]) __builtin_memset(buffer, 0, sizes.inputs_size() * sizeof(R));
}
template <class R>
static int64_t gradient_chunk(const WinogradShape& s) {
  return GradientSizes<R>(s).chunk;
}
template <class R>
static int64_t gradient_panels(const WinogradShape& s) {
  return GradientSizes<R>(s).panels;
}
// Elements of both transformed inputs, of all sums and of those of the bias.
template <class R>
static int64_t gradient_buffer_size(const WinogradShape& s) {
  const GradientSizes<R> sizes(s);
  return sizes.inputs_size() + sizes.grads_size() + 16 * sizes.sums_place() + sizes.vectors * sizes.kLanes;
}

// A g A^T of a square's gradient, for all channels.
template <class T, class R>
static void spread_gradient(const T* const (&pixels)[4], int64_t channels, R* __restrict__ to, int64_t place) {
  using V = typename Arithmetic<T>::Type;
  for (int64_t c = 0; c < channels; c += Arithmetic<T>::kLanes) {
    V upper[2], lower[2];
#pragma GCC unroll 2
    for (int x = 0; x < 2; ++x) {
      upper[x] = load_columns(pixels[x] + c, channels - c);
      lower[x] = load_columns(pixels[2 + x] + c, channels - c);
    }
    R* places = to + c;
    const auto store_row = [&](V left, V right) EVKERNELS_LOOP_BODY {
      store(places, left);
      store(places + place, left + right);
      store(places + 2 * place, left - right);
      store(places + 3 * place, -right);
      places += 4 * place;
    };
    store_row(upper[0], upper[1]);
    store_row(upper[0] + lower[0], upper[1] + lower[1]);
    store_row(upper[0] - lower[0], upper[1] - lower[1]);
    store_row(-lower[0], -lower[1]);
  }
}

// The 2x2 pixels of the square eight further on: without this it takes a third longer with 24 and 32 channels at
// 260x346.
template <class T>
EVKERNELS_INLINE void prefetch_square(const T* maps, int64_t channels, const Maps& m, const SquarePlace& square,
                                      int64_t below) {
  for (int64_t y = below; y < below + 2; ++y) {
    prefetch_line(maps + square.pixel(m, y, kPixelsAhead) * channels, 2 * channels);
  }
}

// The squares [first + begin, first + end) of a chunk that begins at `first`. `zeros` is a pixel of zeros.
template <class T, class R>
static void gradient_squares(const T* grad, const T* const (&inputs)[2], const T* zeros, R* buffer,
                             const WinogradShape& s, int64_t first, int64_t begin, int64_t end) {
  const GradientSizes<R> sizes(s);
  R* const grads = buffer + sizes.inputs_size();
  SquarePlace place(s.maps, first + begin);
  for (int64_t square = begin; square < end; ++square, place.advance(s.maps)) {
    R* to = buffer + square * sizes.input_square;
    for (int k = 0; k < 2; to += sizes.columns[k++]) {
      if (s.inputs[k] == 0) continue;
      if constexpr (sizeof(T) > 2) {
        if (s.inputs[k] == sizes.columns[k]) {
          const WinogradInput<R> input = {inputs[k], s.inputs[k], s.inputs[k]};
          winograd_spread_square(input, zeros, s.maps, place, to, sizes.input_place);
          continue;
        }
      }
      const T* pixels[16];
      prefetch_square(inputs[k], s.inputs[k], s.maps, place, 1);
      pixels_around<4>(inputs[k], s.inputs[k], zeros, s.maps, place, 1, pixels);
      winograd_spread([&](int at, int64_t c)
                          EVKERNELS_LOOP_BODY { return load_columns(pixels[at] + c, s.inputs[k] - c); },
                      s.inputs[k], to, sizes.input_place);
    }
    prefetch_square(grad, s.channels, s.maps, place, 0);
    const T* pixels[4];
    pixels_around<2>(grad, s.channels, zeros, s.maps, place, 0, pixels);
    spread_gradient(pixels, s.channels, grads + square * sizes.grad_square, sizes.grad_place);
  }
}

// sums[row][vectors] += sum over squares of input[square][row] * grad[square][vectors], or = where nothing was before.
template <int vectors, class R>
static void gradient_product(const R* __restrict__ input, int64_t input_square, const R* __restrict__ grad,
                             int64_t grad_square, int64_t squares, int64_t rows, bool before, R* __restrict__ sums) {
  using V = typename Arithmetic<R>::Type;
  constexpr int kRows = kGradientRows<vectors>;
  constexpr int64_t kLanes = Arithmetic<R>::kLanes;
  for (int64_t first = 0; first < rows; first += kRows, sums += kRows * vectors * kLanes) {
    V sum[kRows][vectors] = {};
    const R *from = input + first, *factors = grad;
    for (int64_t square = 0; square < squares; ++square, from += input_square, factors += grad_square) {
      V column[vectors];
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) column[n] = load(factors + n * kLanes);
#pragma GCC unroll 24
      for (int m = 0; m < kRows; ++m) {
        const V row = from[m] - V{};
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) sum[m][n] = multiply_add(row, column[n], sum[m][n]);
      }
    }
#pragma GCC unroll 24
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) {
        R* const to = sums + (m * vectors + n) * kLanes;
        store(to, before ? load(to) + sum[m][n] : sum[m][n]);
      }
    }
  }
}

// sums[vectors] += sum over squares of grad[square][vectors], or = likewise.
template <int vectors, class R>
static void gradient_sum(const R* __restrict__ grad, int64_t grad_square, int64_t squares, bool before,
                         R* __restrict__ sums) {
  using V = typename Arithmetic<R>::Type;
  constexpr int64_t kLanes = Arithmetic<R>::kLanes;
  V sum[vectors] = {};
  for (int64_t square = 0; square < squares; ++square, grad += grad_square) {
#pragma GCC unroll 4
    for (int n = 0; n < vectors; ++n) sum[n] += load(grad + n * kLanes);
  }
  for (int n = 0; n < vectors; ++n) store(sums + n * kLanes, before ? load(sums + n * kLanes) + sum[n] : sum[n]);
}

// In this place of its 16, A g A^T is the sum of the square's four pixels.
constexpr int64_t kSumPlace = 5;

// Products [begin, end) of 16 places by all panels, over `squares` squares.
template <class R>
static void gradient_products(R* buffer, const WinogradShape& s, int64_t squares, bool before, int64_t begin,
                              int64_t end) {
  constexpr int64_t kLanes = Arithmetic<R>::kLanes;
  const GradientSizes<R> sizes(s);
  for (int64_t product = begin; product < end; ++product) {
    const int64_t place = product / sizes.panels, first = product % sizes.panels * kGradientVectors;
    const R* const input = buffer + place * sizes.input_place;
    const R* const grad = buffer + sizes.inputs_size() + place * sizes.grad_place + first * kLanes;
    R* const sums =
        buffer + sizes.inputs_size() + sizes.grads_size() + place * sizes.sums_place() + first * kLanes * sizes.rows;
    const auto product_of = [&](auto vectors) EVKERNELS_LOOP_BODY {
      gradient_product<decltype(vectors)::value>(input, sizes.input_square, grad, sizes.grad_square, squares,
                                                 sizes.rows, before, sums);
      if (place != kSumPlace) return;
      R* const bias_sums = buffer + sizes.inputs_size() + sizes.grads_size() + 16 * sizes.sums_place() + first * kLanes;
      gradient_sum<decltype(vectors)::value>(grad, sizes.grad_square, squares, before, bias_sums);
    };
    with_vectors(smaller(kGradientVectors, sizes.vectors - first), product_of);
  }
}

// The output channels of the panels [begin, end) of d_weight [channels][all inputs][9] and d_bias [channels].
template <class R>
static void weight_gradient(const R* buffer, R* d_weight, R* d_bias, const WinogradShape& s, int64_t begin,
                            int64_t end) {
  using V = typename Arithmetic<R>::Type;
  constexpr int64_t kLanes = Arithmetic<R>::kLanes;
  const GradientSizes<R> sizes(s);
  const R half = 0.5;
  const int64_t columns = s.inputs[0] + s.inputs[1];
  const R* const all_sums = buffer + sizes.inputs_size() + sizes.grads_size();
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kGradientVectors, vectors = smaller(kGradientVectors, sizes.vectors - first);
    const int64_t channels = smaller(vectors * kLanes, s.channels - first * kLanes);
    __builtin_memcpy(d_bias + first * kLanes, all_sums + 16 * sizes.sums_place() + first * kLanes,
                     channels * sizeof(R));
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t row = column < s.inputs[0] ? column : sizes.columns[0] + column - s.inputs[0];
      for (int64_t v = 0; v < vectors; ++v) {
        const R* const from = all_sums + first * kLanes * sizes.rows + (row * vectors + v) * kLanes;
        V rows[3][4];
#pragma GCC unroll 4
        for (int x = 0; x < 4; ++x) {
          const V s0 = load(from + x * sizes.sums_place()), s1 = load(from + (4 + x) * sizes.sums_place());
          const V s2 = load(from + (8 + x) * sizes.sums_place()), s3 = load(from + (12 + x) * sizes.sums_place());
          rows[0][x] = s0 + half * (s1 + s2);
          rows[1][x] = half * (s1 - s2);
          rows[2][x] = half * (s1 + s2) + s3;
        }
        R taps[9][kLanes];
#pragma GCC unroll 3
        for (int y = 0; y < 3; ++y) {
          store(taps[3 * y], rows[y][0] + half * (rows[y][1] + rows[y][2]));
          store(taps[3 * y + 1], half * (rows[y][1] - rows[y][2]));
          store(taps[3 * y + 2], half * (rows[y][1] + rows[y][2]) + rows[y][3]);
        }
        const int64_t output = (first + v) * kLanes;
        for (int64_t lane = 0; lane < smaller(kLanes, s.channels - output); ++lane) {
          R* const to = d_weight + ((output + lane) * columns + column) * 9;
          for (int tap = 0; tap < 9; ++tap) to[tap] = taps[tap][lane];
        }
      }
    }
  }
}
