// How a depthwise convolution is shared out on the GPU: one thread per strip, one column of a few rows of the output.
// Threads run along the rows of memory, pixels if contiguous, pixels and channels if channels_last, so that loads and
// stores are whole cache lines; neighbouring columns meet in L1.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/device.cuh"
#include "depthwise_conv2d/geometry.h"

namespace evkernels {

constexpr int kDepthwiseThreads = 256;
// Threads that hide the latency of memory; only beyond that many do strips grow longer, up to kDepthwiseStrip rows.
#if defined(EVKERNELS_EMULATE)
// So few that the small images of the tests have long strips as well.
constexpr int64_t kDepthwiseManyThreads = 1 << 8;
#else
constexpr int64_t kDepthwiseManyThreads = 1 << 17;
#endif
constexpr int64_t kDepthwiseStrip = 16;

// Sizes in 32 bits: the device divides them many times faster. Offsets into tensors have 64 bits.
struct DepthwiseSizes {
  int planes, channels, filters, height, width, out_height, out_width, k, stride, padding, dilation;
  int rows;  // of a strip
};

// One thread's strip: output rows [first, last) of one column of one channel.
struct DepthwiseStrip {
  int plane, first, last, column, channel, filter;

  // Where an output pixel lies.
  __device__ __forceinline__ int64_t output(int row, const DepthwiseSizes& g) const {
    return ((static_cast<int64_t>(plane) * g.out_height + row) * g.out_width + column) * g.channels + channel;
  }
  // Where the input pixel under its upper left tap lies, which may be outside of the image.
  __device__ __forceinline__ int64_t input(int row, const DepthwiseSizes& g) const {
    const int64_t top = static_cast<int64_t>(plane) * g.height + row * g.stride - g.padding;
    return (top * g.width + column * g.stride - g.padding) * g.channels + channel;
  }
};

__device__ __forceinline__ DepthwiseStrip depthwise_strip(int plane, int strip, int column, int channel,
                                                          const DepthwiseSizes& g) {
  const int first = strip * g.rows;
  return {plane,  first,   min(first + g.rows, g.out_height),
          column, channel, g.channels == 1 ? plane % g.filters : channel};
}

// This thread's strip of planes of the given number of rows, or false behind the last.
__device__ __forceinline__ bool depthwise_own_strip(const DepthwiseSizes& g, DepthwiseStrip& at) {
  const unsigned strips = (g.out_height + g.rows - 1u) / g.rows,
                 row_size = static_cast<unsigned>(g.out_width) * g.channels;
  const unsigned thread = blockIdx.x * kDepthwiseThreads + threadIdx.x;
  const unsigned element = thread % row_size, strip = thread / row_size;
  if (strip / strips >= static_cast<unsigned>(g.planes)) return false;
  at = depthwise_strip(strip / strips, strip % strips, element / g.channels, element % g.channels, g);
  return true;
}

// The gradient at the pre-activation: d_pre where there is an activation, else that of the output.
template <class T>
__device__ __forceinline__ Compute<T> depthwise_gradient(const T* __restrict__ d_y,
                                                         const Compute<T>* __restrict__ d_pre, int64_t at) {
  return d_pre ? d_pre[at] : to_float(d_y[at]);
}

// Rows of a strip: as many as leave the GPU busy, by the shape alone.
inline DepthwiseSizes depthwise_sizes(const DepthwiseGeometry& g) {
  const auto narrow = [](int64_t size) {
    if (size > INT32_MAX) throw std::invalid_argument("sizes must be below 2^31, got " + std::to_string(size));
    return static_cast<int>(size);
  };
  const int64_t rows = g.planes * g.out_height * g.out_width * g.channels / kDepthwiseManyThreads;
  return {narrow(g.planes),    narrow(g.channels),
          narrow(g.filters),   narrow(g.height),
          narrow(g.width),     narrow(g.out_height),
          narrow(g.out_width), narrow(g.k),
          narrow(g.stride),    narrow(g.padding),
          narrow(g.dilation),  static_cast<int>(rows < 1 ? 1 : rows < kDepthwiseStrip ? rows : kDepthwiseStrip)};
}
inline int64_t depthwise_strips(const DepthwiseSizes& g) { return ceil_div(g.out_height, g.rows) * g.out_width; }

// Blocks for a thread per strip. Threads are counted in 32 bits.
inline dim3 depthwise_grid(const DepthwiseSizes& g) {
  const int64_t threads = g.planes * depthwise_strips(g) * g.channels;
  if (threads > UINT32_MAX - kDepthwiseThreads) {
    throw std::invalid_argument("depthwise_conv2d takes at most 2^36 elements on CUDA");
  }
  return grid_dimensions(ceil_div(threads, kDepthwiseThreads));
}

// Calls f(std::integral_constant<int, K>) with the sizes that have kernels of their own, 0 for others and for dilated
// filters.
template <class T, class F>
void dispatch_filter_size(const DepthwiseSizes& g, const F& f) {
  if constexpr (!std::is_same_v<T, double>) {
    if (g.k == 3 && g.dilation == 1) return f(std::integral_constant<int, 3>{});
    if (g.k == 5 && g.dilation == 1) return f(std::integral_constant<int, 5>{});
  }
  return f(std::integral_constant<int, 0>{});
}

}  // namespace evkernels
