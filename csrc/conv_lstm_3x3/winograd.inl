// A 3x3 convolution with zero padding by Winograd's F(2x2, 3x3), with an epilogue that gets the sums in registers.
//
// A square of 2x2 pixels is A^T [(G w G^T) . (B^T d B)] A of its 4x4 surroundings d: 16 products instead of 36. A block
// of squares is transformed to [16][square][channel]; for a panel of up to four vectors of output columns each of the
// 16 places is a matrix product in a register block, and while the panel's results are in the cache they are
// transformed back and handed to the epilogue. Transformed weights are packed once per call, [panel][16][depth][4
// vectors].
//
// Output columns come in units: one vector of channels of each of `gates` gates, side by side, so that an epilogue sees
// all gates of a channel at once. Four gates of so few channels that half a vector holds them share vectors, two to
// each: half of the products would be zeros otherwise. Every sum runs over the channels in ascending order: results
// depend neither on threads nor on the block that a square falls into.
//
// Maps are read where they are, with pixels of zeros in place of those beyond their edges: copies with a border of
// zeros cost a convolution of 16 channels a fifth of its time, mostly for fresh pages.
//
// The error is that of sums over the 4x4 surroundings, about three times that of a direct sum; a NaN or an infinity
// reaches all pixels of the squares that see it.

#include "conv_lstm_3x3/squares.inl"

constexpr int kPanelVectors = 4;
// Rows of a register block for each number of vectors, about as many sums as there are registers for.
constexpr int kMostSums = EVKERNELS_LANES == 16 ? 24 : 12;
constexpr int64_t kMostRows = kMostSums;

// Maps [batch][height][width][stride], of which the first `channels` count. Whole vectors of them are read.
template <class R>
struct WinogradInput {
  const R* maps;
  int64_t channels, stride;
};

template <class R>
struct WinogradSizes {
  static constexpr int64_t kLanes = Arithmetic<R>::kLanes;
  int64_t depth, vectors, panels;
  int64_t sharing;  // gates per vector
  int64_t row;  // stride of the transformed squares: a vector more than needed, which also spreads the sets of a cache
  int64_t block;  // squares, a multiple of kMostRows

  EVKERNELS_LOOP_BODY explicit WinogradSizes(const WinogradShape& s) {
    depth = s.inputs[0] + s.inputs[1];
    sharing = s.gates == 4 && 2 * s.channels <= kLanes ? 2 : 1;
    vectors = (s.channels + kLanes - 1) / kLanes * s.gates / sharing;
    panels = (vectors + kPanelVectors - 1) / kPanelVectors;
    row = round_up(s.inputs[0] + round_up(s.inputs[1], kLanes) + kLanes, kLanes);
    // Of few channels the 16 places of a block should stay in the first-level cache: 1.05 to 1.2 times as fast without
    // AVX-512, 1.02 to 1.1 times with it, there only while all weights fit the second-level cache beside them. Of many,
    // a place of the block, block x depth, should only leave room in the second-level cache for the weights that it
    // meets: they are read once per block, and small blocks take 1.4 times as long with 512 inputs.
    const bool few = depth <= 128 && (EVKERNELS_LANES != 16 || 16 * depth * vectors * kLanes <= int64_t{1} << 18);
    const int64_t fitting = few ? kMostRows : (int64_t{1} << 16) / row / kMostRows * kMostRows;
    const int64_t most = fitting < kMostRows ? kMostRows : smaller(fitting, 5 * kMostRows);
    // Blocks of nearly one size, at least one.
    const int64_t count = s.maps.squares(), blocks = (count + most - 1) / most;
    block = blocks == 0 ? kMostRows : round_up((count + blocks - 1) / blocks, kMostRows);
  }
  EVKERNELS_LOOP_BODY int64_t place() const { return block * row; }
  // A square's results lie side by side, at fixed distances: [square][16][vectors of a panel].
  static constexpr int64_t kResultPlace = kPanelVectors * kLanes, kResultSquare = 16 * kResultPlace + 2 * kLanes;
};

template <class R>
static int64_t winograd_blocks(const WinogradShape& s) {
  const WinogradSizes<R> sizes(s);
  return (s.maps.squares() + sizes.block - 1) / sizes.block;
}
// Elements of the packed weights, and of what each thread needs.
template <class R>
static int64_t winograd_packed_size(const WinogradShape& s) {
  const WinogradSizes<R> sizes(s);
  return 16 * sizes.panels * kPanelVectors * sizes.kLanes * sizes.depth;
}
// How many of them packing writes: the last panel may have fewer vectors.
template <class R>
static int64_t winograd_written_size(const WinogradShape& s) {
  const WinogradSizes<R> sizes(s);
  return 16 * sizes.vectors * sizes.kLanes * sizes.depth;
}
template <class R>
static int64_t winograd_panels(const WinogradShape& s) {
  return WinogradSizes<R>(s).panels;
}
template <class R>
static int64_t winograd_buffer_size(const WinogradShape& s) {
  const WinogradSizes<R> sizes(s);
  return 16 * sizes.place() + sizes.block * sizes.kResultSquare + sizes.row;
}

// Where a gate's weights are: of output channel 0 and input channel 0, and the distances to the next of either. A
// gradient's taps run backward.
template <class T>
struct WinogradWeight {
  const T* gates[4];
  int64_t output_stride, input_stride;
  bool backward;
};

// G w G^T of one vector of weights, to 16 places.
template <class V, class R>
EVKERNELS_INLINE void winograd_spread_weight(const R (&taps)[9][Arithmetic<R>::kLanes], R* to, int64_t place) {
  const R half = 0.5;
  V rows[4][3];
#pragma GCC unroll 3
  for (int x = 0; x < 3; ++x) {
    const V w0 = load(taps[x]), w1 = load(taps[3 + x]), w2 = load(taps[6 + x]), ends = w0 + w2;
    rows[0][x] = w0;
    rows[1][x] = half * (ends + w1);
    rows[2][x] = half * (ends - w1);
    rows[3][x] = w2;
  }
#pragma GCC unroll 4
  for (int y = 0; y < 4; ++y, to += 4 * place) {
    const V ends = rows[y][0] + rows[y][2];
    store(to, rows[y][0]);
    store(to + place, half * (ends + rows[y][1]));
    store(to + 2 * place, half * (ends - rows[y][1]));
    store(to + 3 * place, rows[y][2]);
  }
}

// Panels [begin, end). A few channels at a time go by way of a small buffer: the 16 places of a panel lie apart by
// powers of two, which a cache has few lines for.
template <class T, class R>
static void winograd_pack(const WinogradWeight<T>& weight, R* packed, const WinogradShape& s, int64_t begin,
                          int64_t end) {
  constexpr int64_t kLanes = Arithmetic<T>::kLanes, kStrip = 8;
  const WinogradSizes<R> sizes(s);
  const int64_t step = weight.backward ? -1 : 1;
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kPanelVectors, vectors = smaller(kPanelVectors, sizes.vectors - first);
    R* const to = packed + 16 * first * kLanes * sizes.depth;
    for (int64_t strip = 0; strip < sizes.depth; strip += kStrip) {
      const int64_t count = smaller(kStrip, sizes.depth - strip);
      R places[16][kStrip * kPanelVectors * kLanes];
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t lanes = kLanes / sizes.sharing, vectors_of_unit = s.gates / sizes.sharing;
        const int64_t unit = (first + v) / vectors_of_unit, channels = smaller(lanes, s.channels - unit * lanes);
        const T* windows[2];
        for (int64_t part = 0; part < sizes.sharing; ++part) {
          windows[part] = weight.gates[(first + v) % vectors_of_unit * sizes.sharing + part] +
                          unit * lanes * weight.output_stride + strip * weight.input_stride + (weight.backward ? 8 : 0);
        }
        for (int64_t k = 0; k < count; ++k) {
          R taps[9][kLanes] = {};
          for (int64_t part = 0; part < sizes.sharing; ++part) {
            for (int64_t lane = 0; lane < channels; ++lane) {
              const T* const window = windows[part] + lane * weight.output_stride + k * weight.input_stride;
#pragma GCC unroll 9
              for (int tap = 0; tap < 9; ++tap) taps[tap][part * lanes + lane] = to_float(window[tap * step]);
            }
          }
          winograd_spread_weight<typename Arithmetic<T>::Type>(taps, places[0] + (k * vectors + v) * kLanes,
                                                               kStrip * kPanelVectors * kLanes);
        }
      }
      for (int place = 0; place < 16; ++place) {
        __builtin_memcpy(to + (place * sizes.depth + strip) * vectors * kLanes, places[place],
                         count * vectors * kLanes * sizeof(R));
      }
    }
  }
}

// B^T d B of one square's surroundings, for all channels of one input: load_pixel(k, c) is the vector of channels from
// c on of the k-th of 16 pixels.
template <class R, class F>
EVKERNELS_INLINE void winograd_spread(const F& load_pixel, int64_t channels, R* __restrict__ to, int64_t place) {
  using V = typename Arithmetic<R>::Type;
  for (int64_t c = 0; c < channels; c += Arithmetic<R>::kLanes) {
    // The two middle rows stay in registers, which have room for them and one row of results.
    V d1[4], d2[4], row[4];
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) d1[x] = load_pixel(4 + x, c), d2[x] = load_pixel(8 + x, c);
    R* places = to + c;
    const auto store_row = [&]() EVKERNELS_LOOP_BODY {
      store(places, row[0] - row[2]);
      store(places + place, row[1] + row[2]);
      store(places + 2 * place, row[2] - row[1]);
      store(places + 3 * place, row[1] - row[3]);
      places += 4 * place;
    };
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) row[x] = load_pixel(x, c) - d2[x];
    store_row();
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) row[x] = d1[x] + d2[x];
    store_row();
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) row[x] = d2[x] - d1[x];
    store_row();
#pragma GCC unroll 4
    for (int x = 0; x < 4; ++x) row[x] = d1[x] - load_pixel(12 + x, c);
    store_row();
  }
}

// The results of one place, to[square][vectors] = sum over k of from[square][k] * weights[k][vectors], for kMostSums /
// vectors squares at a time.
template <int vectors, class R>
static void winograd_product(const R* __restrict__ from, int64_t stride, const R* __restrict__ weights, int64_t depth,
                             int64_t count, R* __restrict__ to) {
  using V = typename Arithmetic<R>::Type;
  constexpr int kRows = kMostSums / vectors;
  constexpr int64_t kLanes = Arithmetic<R>::kLanes, kSquare = WinogradSizes<R>::kResultSquare;
  for (int64_t first = 0; first < count; first += kRows, from += kRows * stride, to += kRows * kSquare) {
    V sum[kRows][vectors];
#pragma GCC unroll 24
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) sum[m][n] = V{};
    }
    for (int64_t k = 0; k < depth; ++k) {
      V column[vectors];
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) column[n] = load(weights + (k * vectors + n) * kLanes);
#pragma GCC unroll 24
      for (int m = 0; m < kRows; ++m) {
        const V row = from[m * stride + k] - V{};
#pragma GCC unroll 4
        for (int n = 0; n < vectors; ++n) sum[m][n] = multiply_add(row, column[n], sum[m][n]);
      }
    }
#pragma GCC unroll 24
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
      for (int n = 0; n < vectors; ++n) store(to + m * kSquare + n * kLanes, sum[m][n]);
    }
  }
}

template <int count>
struct VectorCount {
  static constexpr int value = count;
};
// Calls f(VectorCount<count>{}) for 1 to 4 vectors.
template <class F>
EVKERNELS_INLINE void with_vectors(int64_t count, const F& f) {
  switch (count) {
    case 1:
      return f(VectorCount<1>{});
    case 2:
      return f(VectorCount<2>{});
    case 3:
      return f(VectorCount<3>{});
    default:
      return f(VectorCount<4>{});
  }
}

// A^T m A: the sums of one gate at the four pixels of a square, from its 16 results.
template <int gates, class V, class R>
EVKERNELS_INLINE void winograd_gather(const R* __restrict__ from, int gate, V (&sums)[4][gates]) {
  constexpr int64_t place = WinogradSizes<R>::kResultPlace;
  V rows[2][4];
#pragma GCC unroll 4
  for (int x = 0; x < 4; ++x) {
    const V m0 = load(from + x * place), m1 = load(from + (4 + x) * place);
    const V m2 = load(from + (8 + x) * place), m3 = load(from + (12 + x) * place);
    rows[0][x] = m0 + m1 + m2;
    rows[1][x] = m1 - m2 - m3;
  }
#pragma GCC unroll 2
  for (int y = 0; y < 2; ++y) {
    sums[2 * y][gate] = rows[y][0] + rows[y][1] + rows[y][2];
    sums[2 * y + 1][gate] = rows[y][1] - rows[y][2] - rows[y][3];
  }
}

// B^T d B of a square's surroundings on one input's maps.
template <class R>
EVKERNELS_INLINE void winograd_spread_square(const WinogradInput<R>& input, const R* zeros, const Maps& m,
                                             const SquarePlace& square, R* __restrict__ to, int64_t place) {
  const int64_t width = m.width, stride = input.stride;
  if (square.is_surrounded(m)) {
    const R* const from = input.maps + square.pixel(m, -1, -1) * stride;
    for (int64_t row = 2; row < 4; ++row) {
      prefetch_line(from + (row * width + kPixelsAhead + 2) * stride, 2 * stride);
    }
    winograd_spread([&](int k, int64_t c)
                        EVKERNELS_LOOP_BODY { return load(from + (k / 4 * width + k % 4) * stride + c); },
                    input.channels, to, place);
  } else {
    const R* pixels[16];
    pixels_around<4>(input.maps, stride, zeros, m, square, 1, pixels);
    winograd_spread([&](int k, int64_t c) EVKERNELS_LOOP_BODY { return load(pixels[k] + c); }, input.channels, to,
                    place);
  }
}

// Blocks [begin, end): finish(place, unit, sums[4][vectors]) for every square and every unit, which is `vectors`
// vectors of sums for each of its pixels.
template <int vectors, class R, class Finish>
EVKERNELS_INLINE void winograd_squares(const WinogradInput<R> (&inputs)[2], const R* __restrict__ packed,
                                       R* __restrict__ buffer, const WinogradShape& s, int64_t begin, int64_t end,
                                       const Finish& finish) {
  using V = typename Arithmetic<R>::Type;
  constexpr int64_t kLanes = Arithmetic<R>::kLanes;
  const WinogradSizes<R> sizes(s);
  const Maps& m = s.maps;
  R *const results = buffer + 16 * sizes.place(), *const zeros = results + sizes.block * sizes.kResultSquare;
  __builtin_memset(zeros, 0, sizes.row * sizeof(R));
  for (int64_t index = begin; index < end; ++index) {
    const int64_t first = index * sizes.block, count = smaller(sizes.block, m.squares() - first);
    if (index == begin && count < sizes.block) {
      // Register blocks reach beyond the last square: leftovers of other computations may be subnormal numbers there.
      for (int64_t at = 0; at < 16; ++at) {
        __builtin_memset(buffer + at * sizes.place() + count * sizes.row, 0,
                         (sizes.block - count) * sizes.row * sizeof(R));
      }
    }
    const SquarePlace start(m, first);
    SquarePlace place = start;
    for (int64_t square = 0; square < count; ++square, place.advance(m)) {
      R* to = buffer + square * sizes.row;
      for (const WinogradInput<R>& input : inputs) {
        winograd_spread_square(input, zeros, m, place, to, sizes.place());
        to += input.channels;
      }
    }
    for (int64_t panel = 0; panel < sizes.panels; ++panel) {
      const int64_t first_vector = panel * kPanelVectors,
                    count_vectors = smaller(kPanelVectors, sizes.vectors - first_vector);
      const R* const weights = packed + 16 * first_vector * kLanes * sizes.depth;
      for (int64_t at = 0; at < 16; ++at) {
        with_vectors(count_vectors, [&](auto number) EVKERNELS_LOOP_BODY {
          winograd_product<decltype(number)::value>(buffer + at * sizes.place(), sizes.row,
                                                    weights + at * sizes.depth * count_vectors * kLanes, sizes.depth,
                                                    count, results + at * sizes.kResultPlace);
        });
      }
      place = start;
      for (int64_t square = 0; square < count; ++square, place.advance(m)) {
        for (int64_t v = 0; v < count_vectors; v += vectors) {
          V sums[4][vectors];
#pragma GCC unroll 4
          for (int n = 0; n < vectors; ++n) {
            winograd_gather(results + square * sizes.kResultSquare + (v + n) * kLanes, n, sums);
          }
          finish(place, (first_vector + v) / vectors, sums);
        }
      }
    }
  }
}

// Blocks [begin, end): epilogue(pixels, unit, sums[4][gates]) for every square and every unit of gates.
template <int gates, class R, class Epilogue>
EVKERNELS_INLINE void winograd_convolve(const WinogradInput<R> (&inputs)[2], const R* __restrict__ packed,
                                        R* __restrict__ buffer, const WinogradShape& s, int64_t begin, int64_t end,
                                        const Epilogue& epilogue) {
  using V = typename Arithmetic<R>::Type;
  const Maps& m = s.maps;
  winograd_squares<gates>(inputs, packed, buffer, s, begin, end,
                          [&](const SquarePlace& place, int64_t unit, V(&sums)[4][gates])
                              EVKERNELS_LOOP_BODY { epilogue(SquarePixels(place, m), unit, sums); });
}
