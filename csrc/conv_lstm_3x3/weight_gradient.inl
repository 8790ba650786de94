// The gradient of a 3x3 convolution's weight: for every output and input channel nine sums over all pixels.
//
// A register block is a few output channels by one vector of input channels by the three taps of a row, so that every
// vector of the input is loaded once for three taps. Inputs are copied to [row][vector][pixel][lanes] with a border of
// zeros and the gradients of a row to [block][pixel][outputs of the block], so that a block reads both in order, out of
// the first-level cache. Sums of one row are added to those of all rows before: two levels, a tenth of the error of
// one.
//
// Without AVX-512 PyTorch's library takes 2.3 to 6 times as long for this in channels_last and 1.2 to 1.3 times on
// contiguous maps, to which these would have to be copied (24 to 192 inputs, one thread of a Zen 3); this runs as fast
// as a large matrix product there. With AVX-512 the library has not been found slow and is used.

// Output channels of a block, with three taps about as many sums as there are registers for.
constexpr int kBlockOutputs = EVKERNELS_LANES == 16 ? 8 : 4;

template <class R>
struct GradientSizes {
  static constexpr int64_t kLanes = Arithmetic<R>::kLanes;
  int64_t vectors[2], line, row, blocks, block_sums;

  EVKERNELS_LOOP_BODY explicit GradientSizes(const WinogradShape& s) {
    for (int k = 0; k < 2; ++k) vectors[k] = (s.inputs[k] + kLanes - 1) / kLanes;
    line = (s.maps.width + 2) * kLanes;
    row = all_vectors() * line;
    blocks = (s.channels + kBlockOutputs - 1) / kBlockOutputs;
    block_sums = all_vectors() * 9 * kBlockOutputs * kLanes;
  }
  EVKERNELS_LOOP_BODY int64_t all_vectors() const { return vectors[0] + vectors[1]; }
};

template <class R>
static int64_t gradient_blocks(const WinogradShape& s) {
  return GradientSizes<R>(s).blocks;
}
// Elements of the copied inputs, and of what a thread needs for `blocks` blocks.
template <class R>
static int64_t gradient_inputs_size(const WinogradShape& s) {
  return s.maps.batch * (s.maps.height + 2) * GradientSizes<R>(s).row;
}
template <class R>
static int64_t gradient_buffer_size(const WinogradShape& s, int64_t blocks) {
  return blocks * (GradientSizes<R>(s).block_sums + s.maps.width * kBlockOutputs);
}

// Rows [begin, end) of all samples, each with its border: batch * (height + 2) in all.
template <class T, class R>
static void gradient_inputs(const T* const (&inputs)[2], R* to, const WinogradShape& s, int64_t begin, int64_t end) {
  constexpr int64_t kLanes = Arithmetic<R>::kLanes;
  const GradientSizes<R> sizes(s);
  const int64_t height = s.maps.height, width = s.maps.width;
  to += begin * sizes.row;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t sample = row / (height + 2), y = row % (height + 2) - 1;
    if (y < 0 || y == height) {
      __builtin_memset(to, 0, sizes.row * sizeof(R));
      to += sizes.row;
      continue;
    }
    for (int k = 0; k < 2; ++k) {
      const T* const from = inputs[k] + (sample * height + y) * width * s.inputs[k];
      for (int64_t c = 0; c < s.inputs[k]; c += kLanes, to += sizes.line) {
        __builtin_memset(to, 0, kLanes * sizeof(R));
        for (int64_t p = 0; p < width; ++p) {
          store(to + (p + 1) * kLanes, load_columns(from + p * s.inputs[k] + c, s.inputs[k] - c));
        }
        __builtin_memset(to + (width + 1) * kLanes, 0, kLanes * sizeof(R));
      }
    }
  }
}

// sums[output][tap][lanes] of a row += gradient [pixel][output] * input [pixel + tap][lanes].
template <class R>
static void gradient_row(const R* __restrict__ grad, const R* __restrict__ input, int64_t width, R* __restrict__ sums) {
  using V = typename Arithmetic<R>::Type;
  constexpr int64_t kLanes = Arithmetic<R>::kLanes;
  V sum[kBlockOutputs][3] = {};
  V left = load(input), middle = load(input + kLanes);
  for (int64_t p = 0; p < width; ++p) {
    const V right = load(input + (p + 2) * kLanes);
#pragma GCC unroll 8
    for (int k = 0; k < kBlockOutputs; ++k) {
      const V factor = grad[p * kBlockOutputs + k] - V{};
      sum[k][0] = multiply_add(factor, left, sum[k][0]);
      sum[k][1] = multiply_add(factor, middle, sum[k][1]);
      sum[k][2] = multiply_add(factor, right, sum[k][2]);
    }
    left = middle;
    middle = right;
  }
#pragma GCC unroll 8
  for (int k = 0; k < kBlockOutputs; ++k) {
#pragma GCC unroll 3
    for (int tap = 0; tap < 3; ++tap) {
      R* const to = sums + (3 * k + tap) * kLanes;
      store(to, load(to) + sum[k][tap]);
    }
  }
}

// The rows of d_weight [channels][all inputs][9] that belong to the blocks [begin, end).
template <class T, class R>
static void weight_gradient(const T* grad, const R* inputs, R* buffer, R* d_weight, const WinogradShape& s,
                            int64_t begin, int64_t end) {
  constexpr int64_t kLanes = Arithmetic<R>::kLanes;
  const GradientSizes<R> sizes(s);
  const int64_t height = s.maps.height, width = s.maps.width, blocks = end - begin;
  R *const sums = buffer, *const row_grad = buffer + blocks * sizes.block_sums;
  __builtin_memset(sums, 0, blocks * sizes.block_sums * sizeof(R));
  for (int64_t row = 0; row < s.maps.batch * height; ++row) {
    const T* const from = grad + row * width * s.channels;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = (begin + block) * kBlockOutputs, count = smaller(kBlockOutputs, s.channels - first);
      R* to = row_grad + block * width * kBlockOutputs;
      for (int64_t p = 0; p < width; ++p, to += kBlockOutputs) {
        if (count == kBlockOutputs) {
#pragma GCC unroll 8
          for (int k = 0; k < kBlockOutputs; ++k) to[k] = to_float(from[p * s.channels + first + k]);
        } else {
          for (int k = 0; k < kBlockOutputs; ++k) to[k] = k < count ? to_float(from[p * s.channels + first + k]) : 0;
        }
      }
    }
    const R* const above = inputs + (row / height * (height + 2) + row % height) * sizes.row;
    for (int64_t v = 0; v < sizes.all_vectors(); ++v) {
      for (int y = 0; y < 3; ++y) {
        for (int64_t block = 0; block < blocks; ++block) {
          gradient_row(row_grad + block * width * kBlockOutputs, above + y * sizes.row + v * sizes.line, width,
                       sums + block * sizes.block_sums + (3 * v + y) * 3 * kBlockOutputs * kLanes);
        }
      }
    }
  }
  const int64_t columns = s.inputs[0] + s.inputs[1];
  for (int64_t c = begin * kBlockOutputs; c < smaller(end * kBlockOutputs, s.channels); ++c) {
    for (int64_t column = 0; column < columns; ++column) {
      const bool second = column >= s.inputs[0];
      const int64_t input = second ? column - s.inputs[0] : column;
      const int64_t v = input / kLanes + (second ? sizes.vectors[0] : 0);
      for (int tap = 0; tap < 9; ++tap) {
        const int64_t place = ((3 * v + tap / 3) * kBlockOutputs + c % kBlockOutputs) * 3 + tap % 3;
        d_weight[(c * columns + column) * 9 + tap] =
            sums[(c / kBlockOutputs - begin) * sizes.block_sums + place * kLanes + input % kLanes];
      }
    }
  }
}
