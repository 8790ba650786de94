// Depthwise-separable convolution of 16-bit numbers on tensor cores: 3 x 3 filters, channels a multiple of 16.
//
// A block takes `rows` rows of 32 output pixels. Its threads first walk down pairs of columns of the tile, so that
// every input row is read once per column of the filter and feeds three sums in registers; the depthwise result,
// activated and rounded as PyTorch rounds it, goes to shared memory for all channels. Then each warp multiplies 32
// pixels of a row by the weights of 32 output channels. The depthwise result never reaches global memory and is
// computed once, whatever the number of output channels; weights come from L1.
//
// On paper instructions bound it, not memory: with SiLU after both convolutions, 64 channels to 64, they are issued on
// sm_80 in 1.7 (channels_last) to 2.0 (NCHW) times the time of the bytes, without in 1.5 to 1.8. Of the 65 and 78 per
// pixel and channel 11 are the filter's multiply-adds and 12 the two activations'. One column per thread, with a branch
// for every column and row of the padding, took 3 times as many. Few blocks of many rows would read less of their
// neighbours' rows, which L2 sees, 1.7 times the bytes in NCHW and 1.3 in channels_last at 9 rows, but leave
// multiprocessors idle; bounded to 64 registers instead of 80 it spills 20 to 56 bytes.
//
// What lies along memory in y (pixels if contiguous, output channels if channels_last) is the product's column, and
// number 4 n + j is column n of product j: each thread ends up with eight neighbours, one 16-byte store. The words
// between two pixels in shared memory are odd, or 4 more than a multiple of 8, so that the lanes that load a fragment
// meet different banks.
#pragma once

#include "common/tensor_core.cuh"
#include "separable_conv2d/activated.cuh"
#include "separable_conv2d/shape.h"

namespace evkernels {

constexpr int kTensorThreads = 256, kTensorColumns = 32, kTensorOutputs = 32, kTensorDepth = 16;
#if defined(EVKERNELS_EMULATE)
constexpr int64_t kTensorShared = 16 << 10;
#else
constexpr int64_t kTensorShared = 72 << 10;  // so that two blocks fit into a multiprocessor
#endif

struct SeparableTile {
  int rows;   // of output pixels
  int pitch;  // 32-bit words from one pixel's depthwise result to the next one's
};

// One or two values of 16 bits in the register that holds them: what a thread loads of the image at once.
template <int kTogether, class T>
struct SeparableWord;
template <class T>
struct SeparableWord<1, T> {
  using Bits = uint16_t;
  static __device__ __forceinline__ void unpack(Bits bits, float (&value)[1]) { value[0] = to_float(T{bits}); }
  static __device__ __forceinline__ Bits pack(const float (&value)[1]) { return from_float<T>(value[0]).bits; }
};
template <class T>
struct SeparableWord<2, T> {
  using Bits = uint32_t;
  static __device__ __forceinline__ void unpack(Bits bits, float (&value)[2]) { floats_of_pair<T>(bits, value); }
  static __device__ __forceinline__ Bits pack(const float (&value)[2]) { return pair_of_floats<T>(value); }
};

// kTogether neighbouring channels of two neighbouring columns of the tile: store(sums) for output rows [0, rows) from
// first_row on, one after the other, sums[side][channel]. x is the first channel's plane of a sample, its pixels `step`
// apart. Both columns share their weights and all but kStride of the columns that they read. Padding is read as zeros;
// an infinite weight makes NaN of it, as some of PyTorch's kernels do.
template <int kStride, int kTogether, class T, class Store>
__device__ __forceinline__ void separable_columns(const T* __restrict__ x, int64_t step, const T* __restrict__ weight,
                                                  const T* __restrict__ bias, const SeparableShape& s, int first_row,
                                                  int rows, int first_column, const Store& store) {
  using Word = SeparableWord<kTogether, T>;
  using Bits = typename Word::Bits;
  constexpr int kInputs = 3 + kStride;
  const int height = static_cast<int>(s.height), width = static_cast<int>(s.width);
  const int left = first_column * kStride - static_cast<int>(s.padding);
  const int top = first_row * kStride - static_cast<int>(s.padding);
  float w[kTogether][9], start[kTogether];
  float sums[3][2][kTogether];  // sums[r] is of the output that the current input row meets at tap row r
#pragma unroll
  for (int v = 0; v < kTogether; ++v) {
    start[v] = bias ? to_float(bias[v]) : 0.0f;
#pragma unroll
    for (int i = 0; i < 6; ++i) sums[i / 2][i % 2][v] = 0.0f;
#pragma unroll
    for (int t = 0; t < 9; ++t) w[v][t] = to_float(weight[v * 9 + t]);
  }
  const bool all_inside = left >= 0 && left + kInputs <= width;  // of the columns
  const int64_t x_row = width * step;
  const T* line = x + (static_cast<int64_t>(top) * width + left) * step;
  const int end = top + (rows - 1) * kStride + 3;
  int until_complete = 3;
#pragma unroll 1
  for (int y = top; y < end; ++y, line += x_row) {
    Bits bits[kInputs];
    const bool row_inside = static_cast<unsigned>(y) < static_cast<unsigned>(height);
    if (row_inside && all_inside) {
#pragma unroll
      for (int c = 0; c < kInputs; ++c) bits[c] = *reinterpret_cast<const Bits*>(line + c * step);
    } else {
#pragma unroll
      for (int c = 0; c < kInputs; ++c) {
        bits[c] = 0;
        if (row_inside && static_cast<unsigned>(left + c) < static_cast<unsigned>(width))
          bits[c] = *reinterpret_cast<const Bits*>(line + c * step);
      }
    }
    float value[kInputs][kTogether];
#pragma unroll
    for (int c = 0; c < kInputs; ++c) Word::unpack(bits[c], value[c]);
#pragma unroll
    for (int r = 2; r >= 0; --r) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
#pragma unroll
        for (int v = 0; v < kTogether; ++v) {
          float sum = r > 0 ? sums[r - 1][side][v] : start[v];
#pragma unroll
          for (int c = 0; c < 3; ++c) sum += value[side * kStride + c][v] * w[v][r * 3 + c];
          sums[r][side][v] = sum;
        }
      }
    }
    if (--until_complete == 0) {
      until_complete = kStride;
      store(sums[2]);
    }
  }
}

template <bool kChannelsLast, class T>
__global__ void __launch_bounds__(kTensorThreads, 3)
    separable_conv2d_tensor_kernel(const T* __restrict__ x, const T* __restrict__ depthwise_weight,
                                   const T* __restrict__ pointwise_weight, const T* __restrict__ depthwise_bias,
                                   const T* __restrict__ pointwise_bias, T* __restrict__ y, SeparableShape s,
                                   SeparableTile tile, bool whole_packs) {
  EVKERNELS_DYNAMIC_SHARED(uint32_t, words);  // [rows][32 pixels][pitch]
  constexpr int kWarps = kTensorThreads / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  const int channels = static_cast<int>(s.channels), outputs = static_cast<int>(s.outputs);
  const int out_height = static_cast<int>(s.out_height), out_width = static_cast<int>(s.out_width);
  const unsigned across = (out_width + kTensorColumns - 1) / kTensorColumns,
                 down = (out_height + tile.rows - 1) / tile.rows;
  const int first_column = static_cast<int>(blockIdx.x % across) * kTensorColumns;
  const int first_row = static_cast<int>(blockIdx.x / across % down) * tile.rows;
  const int64_t sample = blockIdx.x / across / down;
  const int rows = out_height - first_row < tile.rows ? out_height - first_row : tile.rows;

  // Neighbouring threads take neighbouring pairs of columns of a channel, or neighbouring pairs of channels.
  constexpr int kTogether = kChannelsLast ? 2 : 1, kPairs = kTensorColumns / 2;
  const int groups = channels / kTogether;
#pragma unroll 1
  for (int item = threadIdx.x; item < groups * kPairs; item += kTensorThreads) {
    const int c = kTogether * (kChannelsLast ? item % groups : item / kPairs);
    const int column = 2 * (kChannelsLast ? item / groups : item % kPairs);
    const int64_t plane = s.height * s.width;
    const T* const from = x + sample * channels * plane + (kChannelsLast ? c : c * plane);
    using Word = SeparableWord<kTogether, T>;
    auto* to = reinterpret_cast<typename Word::Bits*>(words + column * tile.pitch) + c / kTogether;
    const int next_pixel = tile.pitch * 2 / kTogether, next_row = kTensorColumns * next_pixel;
    const auto store = [&](float (&sums)[2][kTogether]) {
      activate_16_bits(s.activation, sums);
      to[0] = Word::pack(sums[0]);
      to[next_pixel] = Word::pack(sums[1]);
      to += next_row;
    };
    const int64_t step = kChannelsLast ? channels : 1;
    const T* const weight = depthwise_weight + c * 9;
    const T* const bias = depthwise_bias ? depthwise_bias + c : nullptr;
    if (s.stride == 1) {
      separable_columns<1, kTogether>(from, step, weight, bias, s, first_row, rows, first_column + column, store);
    } else {
      separable_columns<2, kTogether>(from, step, weight, bias, s, first_row, rows, first_column + column, store);
    }
  }
  __syncthreads();

  const int chunks = (outputs + kTensorOutputs - 1) / kTensorOutputs;
#pragma unroll 1
  for (int item = warp; item < rows * chunks; item += kWarps) {
    const int row = item / chunks, first_output = item % chunks * kTensorOutputs;
    const uint32_t* const pixels = words + row * (kTensorColumns * tile.pitch) + quad;
    // The two words of a fragment that belong to one row of an operand, 8 channels apart.
    const auto of_pixel = [&](int pixel, int depth, uint32_t& low, uint32_t& high) {
      const uint32_t* const at = pixels + pixel * tile.pitch + depth / 2;
      low = at[0];
      high = at[4];
    };
    const auto of_output = [&](int o, int depth, uint32_t& low, uint32_t& high) {
      if (first_output + o >= outputs) return;
      const T* const at = pointwise_weight + static_cast<int64_t>(first_output + o) * channels + depth + 2 * quad;
      low = __ldg(reinterpret_cast<const uint32_t*>(at));
      high = __ldg(reinterpret_cast<const uint32_t*>(at + 8));
    };
    // Row 8 m + group of the product, columns 8 quad + n; sums begin with their biases.
    float sums[2][4][4];
    const auto sum = [&](int m, int n) -> float& { return sums[m / 2][n % 4][m % 2 * 2 + n / 4]; };
    const auto bias = [&](int o) {
      return pointwise_bias ? to_float(pointwise_bias[min(first_output + o, outputs - 1)]) : 0.0f;
    };
#pragma unroll
    for (int i = 0; i < (kChannelsLast ? 8 : 4); ++i) {
      const float start = bias(kChannelsLast ? 8 * quad + i : 8 * i + group);
#pragma unroll
      for (int k = 0; k < (kChannelsLast ? 4 : 8); ++k) (kChannelsLast ? sum(k, i) : sum(i, k)) = start;
    }
#pragma unroll 1
    for (int depth = 0; depth < channels; depth += kTensorDepth) {
      uint32_t a[2][4] = {};
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        uint32_t &low = a[m / 2][m % 2], &high = a[m / 2][m % 2 + 2];
        kChannelsLast ? of_pixel(m * 8 + group, depth, low, high) : of_output(m * 8 + group, depth, low, high);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t b[2] = {};
        kChannelsLast ? of_output(group * 4 + j, depth, b[0], b[1]) : of_pixel(group * 4 + j, depth, b[0], b[1]);
#pragma unroll
        for (int m = 0; m < 2; ++m) multiply_matrices<T>(sums[m][j], a[m], b);
      }
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int column = first_column + (kChannelsLast ? m * 8 + group : 8 * quad);
      const int o = first_output + (kChannelsLast ? 8 * quad : m * 8 + group);
      if (column >= out_width || o >= outputs) continue;
      float values[1][8];
#pragma unroll
      for (int n = 0; n < 8; ++n) values[0][n] = sum(m, n);
      activate_16_bits(s.output_activation, values);
      Packed<T, 8> pack;
#pragma unroll
      for (int n = 0; n < 8; ++n) pack[n] = from_float<T>(values[0][n]);
      const int64_t pixel = static_cast<int64_t>(first_row + row) * out_width + column,
                    plane = s.out_height * s.out_width;
      T* const to =
          y + (kChannelsLast ? (sample * plane + pixel) * outputs + o : (sample * outputs + o) * plane + pixel);
      const int left = kChannelsLast ? outputs - o : out_width - column;
      if (whole_packs) {
        store_packed(to, pack);
      } else {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          if (n < left) to[n] = pack[n];
        }
      }
    }
  }
}

// The rows of a tile, of which `fitting` fit into shared memory: those with which the multiprocessor that gets the most
// blocks has the least to do. A row costs about as much in the depthwise phase as in the product, and of the rows that
// a tile reads two are its neighbours' as well.
inline int64_t separable_tile_rows(int64_t out_height, int64_t columns_of_tiles, int64_t fitting,
                                   int64_t multiprocessors) {
  const auto cost = [&](int64_t rows) {
    return ceil_div(columns_of_tiles * ceil_div(out_height, rows), multiprocessors) * (2 * rows + 2);
  };
  int64_t best = 1;
  for (int64_t rows = 2; rows <= fitting; ++rows) {
    if (cost(rows) <= cost(best)) best = rows;
  }
  return best;
}

// False where another kernel must do it.
template <class T>
bool launch_separable_conv2d_tensor(const T* x, const T* depthwise_weight, const T* pointwise_weight,
                                    const T* depthwise_bias, const T* pointwise_bias, T* y, const SeparableShape& s,
                                    bool channels_last, cudaStream_t stream) {
  constexpr int64_t kLargest = int64_t{1} << 30;  // of sizes that are multiplied by a stride in 32 bits
  if (s.size != 3 || s.channels % kTensorDepth != 0 || s.height > kLargest || s.width > kLargest ||
      s.channels > kLargest || s.outputs > kLargest || !can_pack<2>(pointwise_weight) ||
      (channels_last && !can_pack<2>(x))) {
    return false;
  }
  const int64_t pitch = s.channels / 2 + (channels_last ? 4 : 1), row_bytes = 4 * pitch * kTensorColumns;
  if (row_bytes > kTensorShared) return false;
  const int64_t across = ceil_div(s.out_width, kTensorColumns);
  const int64_t fitting = kTensorShared / row_bytes < s.out_height ? kTensorShared / row_bytes : s.out_height;
  const int64_t rows = separable_tile_rows(s.out_height, s.batch * across, fitting, multiprocessor_count());
  const bool whole_packs = (channels_last ? s.outputs : s.out_width) % 8 == 0 && can_pack<8>(y);
  const auto launch = [&](auto* kernel) {
    const int64_t bytes = rows * row_bytes;
    if (bytes > 48 << 10)
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    EVKERNELS_LAUNCH(kernel, grid_dimensions(s.batch * across * ceil_div(s.out_height, rows)), dim3(kTensorThreads),
                     bytes, stream, x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, y, s,
                     SeparableTile{static_cast<int>(rows), static_cast<int>(pitch)}, whole_packs);
  };
  channels_last ? launch(&separable_conv2d_tensor_kernel<true, T>) : launch(&separable_conv2d_tensor_kernel<false, T>);
  return true;
}

}  // namespace evkernels
