// Depthwise-separable convolution of 16-bit numbers on tensor cores: 3 x 3 filters, channels a multiple of 16.
//
// A block takes `rows` rows of 32 output pixels. Its threads first walk down the columns of the tile, channel by
// channel, so that every input row is read once per column of the filter and feeds three sums in registers; the
// depthwise result, activated and rounded as PyTorch rounds it, goes to shared memory for all channels. Then each warp
// multiplies 32 pixels of a row by the weights of 32 output channels. The depthwise result never reaches global memory
// and is computed once, whatever the number of output channels; weights come from L1.
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
constexpr int64_t kTensorShared = 16 << 10, kTensorBlocks = 4;
#else
constexpr int64_t kTensorShared = 72 << 10;  // so that two blocks fit into a multiprocessor
constexpr int64_t kTensorBlocks = 128;       // that keep all multiprocessors busy, before tiles grow
#endif

struct SeparableTile {
  int rows;   // of output pixels
  int pitch;  // 32-bit words from one pixel's depthwise result to the next one's
};

// One column of the tile: store(row, value) for output rows [0, rows) from first_row on. x is the plane of one channel
// of a sample, its pixels `step` apart.
template <class T, class Store>
__device__ __forceinline__ void separable_column(const T* __restrict__ x, int64_t step, const T* __restrict__ weight,
                                                 float bias, const SeparableShape& s, int first_row, int rows,
                                                 int column, const Store& store) {
  const int height = static_cast<int>(s.height), width = static_cast<int>(s.width);
  const int stride = static_cast<int>(s.stride), padding = static_cast<int>(s.padding);
  const int left = column * stride - padding, top = first_row * stride - padding;
  float w[9], sums[3] = {};  // sums[r] is of the output that the current input row meets at tap row r
  bool inside[3];
#pragma unroll
  for (int t = 0; t < 9; ++t) w[t] = to_float(weight[t]);
#pragma unroll
  for (int c = 0; c < 3; ++c) inside[c] = left + c >= 0 && left + c < width && column < s.out_width;
  const bool all_inside = inside[0] && inside[1] && inside[2];
  const int64_t x_row = width * step;
  const T* line = x + (static_cast<int64_t>(top) * width + left) * step;
  int until_complete = 3, row = 0;
#pragma unroll 1
  for (int y = top; row < rows; ++y, line += x_row) {
    sums[2] = sums[1];
    sums[1] = sums[0];
    sums[0] = bias;
    if (y >= 0 && y < height) {
      float value[3];
#pragma unroll
      for (int c = 0; c < 3; ++c) value[c] = inside[c] ? to_float(line[c * step]) : 0.0f;
#pragma unroll
      for (int c = 0; c < 3; ++c) {
        // Left out, not multiplied by zero: an infinite weight must not make a NaN of it.
        if (!all_inside && !inside[c]) continue;
#pragma unroll
        for (int r = 0; r < 3; ++r) sums[r] += value[c] * w[r * 3 + c];
      }
    }
    if (--until_complete == 0) {
      until_complete = stride;
      store(row++, sums[2]);
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

  // A warp's lanes are 32 columns of one channel, or 32 channels of one column.
  const int items = kChannelsLast ? (channels + 31) / 32 * kTensorColumns : channels;
#pragma unroll 1
  for (int item = warp; item < items; item += kWarps) {
    const int c = kChannelsLast ? item / kTensorColumns * 32 + lane : item;
    const int column = kChannelsLast ? item % kTensorColumns : lane;
    if (c >= channels) continue;
    const int64_t plane = s.height * s.width;
    const T* const from = x + sample * channels * plane + (kChannelsLast ? c : c * plane);
    T* const to = reinterpret_cast<T*>(words + column * tile.pitch) + c;
    separable_column(from, kChannelsLast ? channels : 1, depthwise_weight + c * 9,
                     depthwise_bias ? to_float(depthwise_bias[c]) : 0.0f, s, first_row, rows, first_column + column,
                     [&](int row, float sum) {
                       to[row * (2 * kTensorColumns * tile.pitch)] = from_float<T>(activated(s.activation, sum));
                     });
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
    float sums[2][4][4] = {};
#pragma unroll 1
    for (int depth = 0; depth < channels; depth += kTensorDepth) {
      uint32_t a[2][4] = {}, b[4][2] = {};
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        uint32_t &low = a[m / 2][m % 2], &high = a[m / 2][m % 2 + 2];
        kChannelsLast ? of_pixel(m * 8 + group, depth, low, high) : of_output(m * 8 + group, depth, low, high);
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        kChannelsLast ? of_output(group * 4 + j, depth, b[j][0], b[j][1])
                      : of_pixel(group * 4 + j, depth, b[j][0], b[j][1]);
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply_matrices<T>(sums[m][j], a[m], b[j]);
      }
    }
    // Row m of the product, columns 8 quad to 8 quad + 7.
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int column = first_column + (kChannelsLast ? m * 8 + group : 8 * quad);
      const int o = first_output + (kChannelsLast ? 8 * quad : m * 8 + group);
      if (column >= out_width || o >= outputs) continue;
      Packed<T, 8> pack;
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        const int own = kChannelsLast && o + n < outputs ? o + n : o;
        const float bias = pointwise_bias ? to_float(pointwise_bias[own]) : 0.0f;
        pack[n] = from_float<T>(activated(s.output_activation, sums[m / 2][n % 4][m % 2 * 2 + n / 4] + bias));
      }
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

// False where another kernel must do it.
template <class T>
bool launch_separable_conv2d_tensor(const T* x, const T* depthwise_weight, const T* pointwise_weight,
                                    const T* depthwise_bias, const T* pointwise_bias, T* y, const SeparableShape& s,
                                    bool channels_last, cudaStream_t stream) {
  constexpr int64_t kLargest = int64_t{1} << 30;  // of sizes that are multiplied by a stride in 32 bits
  if (s.size != 3 || s.channels % kTensorDepth != 0 || s.height > kLargest || s.width > kLargest ||
      s.channels > kLargest || s.outputs > kLargest || !can_pack<2>(pointwise_weight)) {
    return false;
  }
  const int64_t pitch = s.channels / 2 + (channels_last ? 4 : 1), row_bytes = 4 * pitch * kTensorColumns;
  if (row_bytes > kTensorShared) return false;
  const int64_t across = ceil_div(s.out_width, kTensorColumns);
  const int64_t wanted = s.batch * across * s.out_height / kTensorBlocks;
  const int64_t fitting = kTensorShared / row_bytes < s.out_height ? kTensorShared / row_bytes : s.out_height;
  const int64_t rows = wanted < 1 ? 1 : wanted < fitting ? wanted : fitting;
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
