// Depthwise convolution on the GPU: one thread per element of the output (of the input for its gradient), in memory
// order, so that both layouts read and write whole cache lines; the k * k reads of neighbours meet in L1.
//
// The gradients of weights and bias are sums over a whole image: a block takes one channel (32 channels if
// channels_last, one per lane) and a fixed range of pixels, and leaves one partial sum per tap; a second kernel adds
// the ranges up in order. No atomics: the same bits on every run.
#pragma once

#include "common/activation.h"
#include "common/device.cuh"
#include "common/device_math.cuh"
#include "depthwise_conv2d/geometry.h"

namespace evkernels {
namespace device_math {
#include "common/activations.inl"
}  // namespace device_math

constexpr int kDepthwiseThreads = 256;
// Pixels in one partial sum.
constexpr int kDepthwiseRange = 4096;

struct DepthwisePosition {
  int64_t plane, row, column, channel;
};

// Where element e of tensors of the given height and width lies: [planes, height, width, channels].
__device__ __forceinline__ DepthwisePosition depthwise_position(int64_t e, int64_t height, int64_t width,
                                                                const DepthwiseGeometry& g) {
  DepthwisePosition at;
  at.channel = e % g.channels;
  e /= g.channels;
  at.column = e % width;
  e /= width;
  at.row = e % height;
  at.plane = e / height;
  return at;
}

__device__ __forceinline__ int64_t depthwise_filter(const DepthwisePosition& at, const DepthwiseGeometry& g) {
  return g.channels == 1 ? at.plane % g.filters : at.channel;
}

// K = 0: the filter's size is known at run time only.
template <int K, class T>
__device__ __forceinline__ Compute<T> depthwise_pre_activation(const T* __restrict__ x, const T* __restrict__ weight,
                                                               const T* __restrict__ bias, const DepthwisePosition& at,
                                                               const DepthwiseGeometry& g) {
  const int k = K ? K : static_cast<int>(g.k);
  const int64_t filter = depthwise_filter(at, g);
  const int64_t top = at.row * g.stride - g.padding, left = at.column * g.stride - g.padding;
  const T* const plane = x + at.plane * g.height * g.width * g.channels + at.channel;
  Compute<T> sum = bias ? to_float(bias[filter]) : Compute<T>(0);
#pragma unroll(K ? K : 1)
  for (int r = 0; r < k; ++r) {
    if (top + r < 0 || top + r >= g.height) continue;
#pragma unroll(K ? K : 1)
    for (int c = 0; c < k; ++c) {
      if (left + c < 0 || left + c >= g.width) continue;
      sum +=
          to_float(plane[((top + r) * g.width + left + c) * g.channels]) * to_float(weight[(filter * k + r) * k + c]);
    }
  }
  return sum;
}

template <int K, Activation kind, class T>
__global__ void __launch_bounds__(kDepthwiseThreads)
    depthwise_conv2d_forward_kernel(const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
                                    T* __restrict__ y, DepthwiseGeometry g, int64_t total) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kDepthwiseThreads + threadIdx.x;
  if (e >= total) return;
  const DepthwisePosition at = depthwise_position(e, g.out_height, g.out_width, g);
  y[e] = from_float<T>(device_math::activate<kind>(depthwise_pre_activation<K>(x, weight, bias, at, g)));
}

// The gradient at the pre-activation.
template <int K, Activation kind, class T>
__global__ void __launch_bounds__(kDepthwiseThreads)
    depthwise_conv2d_backward_activation_kernel(const T* __restrict__ x, const T* __restrict__ weight,
                                                const T* __restrict__ bias, const T* __restrict__ d_y,
                                                Compute<T>* __restrict__ d_pre, DepthwiseGeometry g, int64_t total) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kDepthwiseThreads + threadIdx.x;
  if (e >= total) return;
  const DepthwisePosition at = depthwise_position(e, g.out_height, g.out_width, g);
  d_pre[e] =
      device_math::activation_gradient<kind>(depthwise_pre_activation<K>(x, weight, bias, at, g), to_float(d_y[e]));
}

// D is T, or Compute<T> after an activation.
template <int K, class D, class T>
__global__ void __launch_bounds__(kDepthwiseThreads)
    depthwise_conv2d_backward_input_kernel(const D* __restrict__ d, const T* __restrict__ weight, T* __restrict__ d_x,
                                           DepthwiseGeometry g, int64_t total) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kDepthwiseThreads + threadIdx.x;
  if (e >= total) return;
  const DepthwisePosition at = depthwise_position(e, g.height, g.width, g);
  const int k = K ? K : static_cast<int>(g.k);
  const int64_t filter = depthwise_filter(at, g);
  const D* const plane = d + at.plane * g.out_height * g.out_width * g.channels + at.channel;
  Compute<T> sum = 0;
#pragma unroll(K ? K : 1)
  for (int r = 0; r < k; ++r) {
    // The output that meets this pixel at tap (r, c), where there is one at this stride.
    const int64_t y = at.row + g.padding - r;
    if (y < 0 || y % g.stride != 0 || y / g.stride >= g.out_height) continue;
#pragma unroll(K ? K : 1)
    for (int c = 0; c < k; ++c) {
      const int64_t x = at.column + g.padding - c;
      if (x < 0 || x % g.stride != 0 || x / g.stride >= g.out_width) continue;
      sum += to_float(plane[(y / g.stride * g.out_width + x / g.stride) * g.channels]) *
             to_float(weight[(filter * k + r) * k + c]);
    }
  }
  d_x[e] = from_float<T>(sum);
}

// Block (range, group of channels, tap row) sums d * x over its pixels for the taps of one row of the filter, and d
// alone in the row behind the last. sums [planes, ranges, k * k + 1, channels].
template <class D, class T>
__global__ void __launch_bounds__(kDepthwiseThreads)
    depthwise_conv2d_backward_sums_kernel(const D* __restrict__ d, const T* __restrict__ x,
                                          Compute<T>* __restrict__ sums, DepthwiseGeometry g, int64_t ranges) {
  using A = Compute<T>;
  __shared__ A partial[kDepthwiseThreads];
  // Lanes run over channels where they are neighbours, over pixels otherwise.
  const int lanes = g.channels == 1 ? 1 : 32;
  const int64_t channel_groups = (g.channels + lanes - 1) / lanes, taps = g.k * g.k + 1;
  int64_t block = blockIdx.x;
  const int64_t tap = block % taps;
  block /= taps;
  const int64_t channel = block % channel_groups * lanes + threadIdx.x % lanes;
  block /= channel_groups;
  const int64_t range = block % ranges, plane = block / ranges;
  const int64_t pixels = g.out_height * g.out_width, first = range * kDepthwiseRange;
  const int64_t last = first + kDepthwiseRange < pixels ? first + kDepthwiseRange : pixels;
  const int64_t r = tap / g.k, c = tap % g.k;
  const D* const d_plane = d + plane * pixels * g.channels + channel;
  const T* const x_plane = x + plane * g.height * g.width * g.channels + channel;
  A sum = 0;
  if (channel < g.channels) {
    for (int64_t pixel = first + threadIdx.x / lanes; pixel < last; pixel += kDepthwiseThreads / lanes) {
      A value = to_float(d_plane[pixel * g.channels]);
      if (tap < g.k * g.k) {
        const int64_t row = pixel / g.out_width * g.stride + r - g.padding;
        const int64_t column = pixel % g.out_width * g.stride + c - g.padding;
        if (row < 0 || row >= g.height || column < 0 || column >= g.width) continue;
        value *= to_float(x_plane[(row * g.width + column) * g.channels]);
      }
      sum += value;
    }
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (int half = kDepthwiseThreads / 2; half >= lanes; half /= 2) {
    if (static_cast<int>(threadIdx.x) < half) partial[threadIdx.x] += partial[threadIdx.x + half];
    __syncthreads();
  }
  if (static_cast<int>(threadIdx.x) < lanes && channel < g.channels) {
    sums[((plane * ranges + range) * taps + tap) * g.channels + channel] = partial[threadIdx.x];
  }
}

// Adds up the ranges and samples of every tap of every filter, in order. d_weight or d_bias may be null.
template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads)
    depthwise_conv2d_reduce_kernel(const Compute<T>* __restrict__ sums, T* __restrict__ d_weight,
                                   T* __restrict__ d_bias, DepthwiseGeometry g, int64_t ranges) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kDepthwiseThreads + threadIdx.x;
  const int64_t taps = g.k * g.k + 1, filter = e % g.filters, tap = e / g.filters;
  if (tap >= taps) return;
  const bool planar = g.channels == 1;
  double total = 0;
  for (int64_t plane = planar ? filter : 0; plane < g.planes; plane += planar ? g.filters : 1) {
    for (int64_t range = 0; range < ranges; ++range) {
      total += sums[((plane * ranges + range) * taps + tap) * g.channels + (planar ? 0 : filter)];
    }
  }
  const T value = from_float<T>(static_cast<Compute<T>>(total));
  if (tap < taps - 1 && d_weight) d_weight[filter * (taps - 1) + tap] = value;
  if (tap == taps - 1 && d_bias) d_bias[filter] = value;
}

inline int64_t depthwise_ranges(const DepthwiseGeometry& g) {
  return ceil_div(g.out_height * g.out_width, kDepthwiseRange);
}
inline int64_t depthwise_sums_size(const DepthwiseGeometry& g) {
  return g.planes * depthwise_ranges(g) * (g.k * g.k + 1) * g.channels;
}
inline dim3 depthwise_grid(int64_t total) { return grid_dimensions(ceil_div(total, kDepthwiseThreads)); }

// Calls f(std::integral_constant<int, K>) with the sizes that have kernels of their own.
template <class F>
void dispatch_filter_size(int64_t k, const F& f) {
  if (k == 3) return f(std::integral_constant<int, 3>{});
  if (k == 5) return f(std::integral_constant<int, 5>{});
  return f(std::integral_constant<int, 0>{});
}

template <Activation kind, class T>
void launch_depthwise_conv2d_forward(const T* x, const T* weight, const T* bias, T* y, const DepthwiseGeometry& g,
                                     cudaStream_t stream) {
  const int64_t total = g.planes * g.out_height * g.out_width * g.channels;
  if (total == 0) return;
  dispatch_filter_size(g.k, [&](auto k) {
    EVKERNELS_LAUNCH((depthwise_conv2d_forward_kernel<decltype(k)::value, kind, T>), depthwise_grid(total),
                     dim3(kDepthwiseThreads), 0, stream, x, weight, bias, y, g, total);
  });
}

template <Activation kind, class T>
void launch_depthwise_conv2d_backward_activation(const T* x, const T* weight, const T* bias, const T* d_y,
                                                 Compute<T>* d_pre, const DepthwiseGeometry& g, cudaStream_t stream) {
  const int64_t total = g.planes * g.out_height * g.out_width * g.channels;
  if (total == 0) return;
  dispatch_filter_size(g.k, [&](auto k) {
    EVKERNELS_LAUNCH((depthwise_conv2d_backward_activation_kernel<decltype(k)::value, kind, T>), depthwise_grid(total),
                     dim3(kDepthwiseThreads), 0, stream, x, weight, bias, d_y, d_pre, g, total);
  });
}

template <class D, class T>
void launch_depthwise_conv2d_backward_input(const D* d, const T* weight, T* d_x, const DepthwiseGeometry& g,
                                            cudaStream_t stream) {
  const int64_t total = g.planes * g.height * g.width * g.channels;
  if (total == 0) return;
  dispatch_filter_size(g.k, [&](auto k) {
    EVKERNELS_LAUNCH((depthwise_conv2d_backward_input_kernel<decltype(k)::value, D, T>), depthwise_grid(total),
                     dim3(kDepthwiseThreads), 0, stream, d, weight, d_x, g, total);
  });
}

// sums: depthwise_sums_size(g) elements of scratch memory.
template <class D, class T>
void launch_depthwise_conv2d_backward_weight(const D* d, const T* x, Compute<T>* sums, T* d_weight, T* d_bias,
                                             const DepthwiseGeometry& g, cudaStream_t stream) {
  const int64_t taps = g.k * g.k + 1, ranges = depthwise_ranges(g),
                groups = g.channels == 1 ? 1 : ceil_div(g.channels, 32);
  if (g.planes > 0) {
    EVKERNELS_LAUNCH((depthwise_conv2d_backward_sums_kernel<D, T>), grid_dimensions(g.planes * ranges * groups * taps),
                     dim3(kDepthwiseThreads), 0, stream, d, x, sums, g, ranges);
  }
  EVKERNELS_LAUNCH((depthwise_conv2d_reduce_kernel<T>), depthwise_grid(g.filters * taps), dim3(kDepthwiseThreads), 0,
                   stream, sums, d_weight, d_bias, g, ranges);
}

}  // namespace evkernels
