// Depthwise convolution on the GPU: a thread walks down one column of a strip of output rows. Every input row is read
// once per column of the filter and feeds the k sums that it meets, kept in registers (k = 3 and 5); one thread per
// output would read k times as much. Other k, and double, do that.
//
// The same kernel is the forward pass, the gradient at the pre-activation, and at stride 1 the gradient of the input,
// which is a convolution with the turned filter. Activation and stride are uniform branches: a kernel for each would
// take twice as long to compile. Weights of columns that fall on padding are zero, so that an infinite one does not
// make NaN of a zero of the padding; leaving these taps out by a branch per row took a fifth more integer instructions
// and for 5 x 5 80 registers instead of 56 on sm_80, but 48 instead of 64 on sm_100. On paper integer instructions
// still bound it, not memory: they take 1.4 to 1.8 times the time of the bytes for 3 x 3, 2.0 for 5 x 5. Multiplying
// zeros of rows outside of the image as well saved moves and cost registers, 63 instead of 56: no gain. In
// channels_last a block's rows of neighbouring columns do not all meet in 32 KiB of L1: level 2 sees 1.6 times the
// bytes, in NCHW 1.1.
#pragma once

#include "common/activation.h"
#include "common/device_math.cuh"
#include "depthwise_conv2d/strips.cuh"
#include "depthwise_conv2d/sums.cuh"

namespace evkernels {
namespace device_math {
#include "common/activations.inl"
}  // namespace device_math

// Stores the output, or where there is d_y the gradient at the pre-activation.
template <class A, class T>
__device__ __forceinline__ void depthwise_store(A pre, Activation activation, const T* __restrict__ d_y,
                                                A* __restrict__ d_pre, T* __restrict__ y, int64_t at) {
  using namespace device_math;
  if (activation == Activation::kNone) {  // before the others' five comparisons: then there is no d_y
    y[at] = from_float<T>(pre);
    return;
  }
  const A d = d_y ? to_float(d_y[at]) : A(0);
  const A result = with_activation(activation, [=](auto constant) {
    constexpr Activation kind = decltype(constant)::value;
    return d_y ? activation_gradient<kind>(pre, d) : activate<kind>(pre);
  });
  if (d_y) {
    d_pre[at] = result;
  } else {
    y[at] = from_float<T>(result);
  }
}

// K = 0: the filter's size is known at run time only. X is T, or Compute<T> where x is itself a gradient.
template <int K, class X, class T>
__global__ void __launch_bounds__(kDepthwiseThreads)
    depthwise_conv2d_rows_kernel(const X* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
                                 const T* __restrict__ d_y, Compute<T>* __restrict__ d_pre, T* __restrict__ y,
                                 DepthwiseSizes g, Activation activation, bool turned) {
  using A = Compute<T>;
  DepthwiseStrip at;
  if (!depthwise_own_strip(g, at)) return;
  const A start = bias ? to_float(bias[at.filter]) : A(0);
  const int left = at.column * g.stride - g.padding;
  const int64_t x_row = static_cast<int64_t>(g.width) * g.channels,
                y_row = static_cast<int64_t>(g.out_width) * g.channels;
  int64_t from = at.input(at.first, g), to = at.output(at.first, g);
  if constexpr (K > 0) {
    A w[K * K], sums[K];  // sums[r] is of the output that the current input row meets at tap row r
    const X* columns[K];  // null where the column lies in the padding, and its weights are zero
    const T* const taps = weight + static_cast<int64_t>(at.filter) * (K * K);
#pragma unroll
    for (int c = 0; c < K; ++c) {
      const bool inside = left + c >= 0 && left + c < g.width;
      columns[c] = inside ? x + from + c * g.channels : nullptr;
      sums[c] = start;
#pragma unroll
      for (int t = c; t < K * K; t += K) w[t] = inside ? to_float(taps[turned ? K * K - 1 - t : t]) : A(0);
    }
    const int end = (at.last - 1) * g.stride - g.padding + K;
    int until_complete = K;
    int64_t step = 0;
#pragma unroll 1
    for (int row = at.first * g.stride - g.padding; row < end; ++row, step += x_row) {
#pragma unroll
      for (int r = K - 1; r > 0; --r) sums[r] = sums[r - 1];
      sums[0] = start;
      if (row >= 0 && row < g.height) {
        A value[K];
#pragma unroll
        for (int c = 0; c < K; ++c) value[c] = columns[c] ? to_float(columns[c][step]) : A(0);
#pragma unroll
        for (int c = 0; c < K; ++c) {
#pragma unroll
          for (int r = 0; r < K; ++r) sums[r] += value[c] * w[r * K + c];
        }
      }
      if (--until_complete == 0) {
        until_complete = g.stride;
        depthwise_store(sums[K - 1], activation, d_y, d_pre, y, to);
        to += y_row;
      }
    }
  } else {
    const int taps = g.k * g.k;
    const T* const w = weight + static_cast<int64_t>(at.filter) * taps;
#pragma unroll 1
    for (int i = at.first; i < at.last; ++i, from += g.stride * x_row, to += y_row) {
      const int top = i * g.stride - g.padding;
      A sum = start;
#pragma unroll 1
      for (int r = 0; r < g.k; ++r) {
        const int row = r * g.dilation;
        if (top + row < 0 || top + row >= g.height) continue;
#pragma unroll 1
        for (int c = 0; c < g.k; ++c) {
          const int column = c * g.dilation;
          if (left + column < 0 || left + column >= g.width) continue;
          const int tap = r * g.k + c;
          sum += to_float(x[from + row * x_row + column * g.channels]) * to_float(w[turned ? taps - 1 - tap : tap]);
        }
      }
      depthwise_store(sum, activation, d_y, d_pre, y, to);
    }
  }
}

// The gradient of the input at stride 2, where only every other tap meets a pixel: input and output have changed places
// in `g`.
template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads)
    depthwise_conv2d_backward_input_kernel(const T* __restrict__ d_y, const Compute<T>* __restrict__ d_pre,
                                           const T* __restrict__ weight, T* __restrict__ d_x, DepthwiseSizes g) {
  DepthwiseStrip at;
  if (!depthwise_own_strip(g, at)) return;
  // 1.5 taps per row and column on average, so that what goes around them bounds it: 4 times the time of the bytes, on
  // paper. Every other tap of [begin, end) meets a gradient, the one at (position - tap) / 2.
  const auto begin = [](int position, int extent) { return max(position % 2, position - 2 * (extent - 1)); };
  const auto end = [&](int position) { return min(g.k, position + 1); };
  const int x = at.column + g.padding, first_column = begin(x, g.width), end_column = end(x);
  const int64_t d_row = static_cast<int64_t>(g.width) * g.channels;
  const int64_t d_column = static_cast<int64_t>((x - first_column) / 2) * g.channels + at.channel;
  const T* const w = weight + static_cast<int64_t>(at.filter) * g.k * g.k;
  int64_t to = at.output(at.first, g);
  const int64_t y_row = static_cast<int64_t>(g.out_width) * g.channels;
#pragma unroll 1
  for (int row = at.first; row < at.last; ++row, to += y_row) {
    const int y = row + g.padding, end_row = end(y);
    int r = begin(y, g.height);
    int64_t line = (static_cast<int64_t>(at.plane) * g.height + (y - r) / 2) * d_row + d_column;
    Compute<T> sum = 0;
#pragma unroll 1
    for (; r < end_row; r += 2, line -= d_row) {
      int64_t from = line;
#pragma unroll 1
      for (int c = first_column; c < end_column; c += 2, from -= g.channels) {
        sum += depthwise_gradient(d_y, d_pre, from) * to_float(w[r * g.k + c]);
      }
    }
    d_x[to] = from_float<T>(sum);
  }
}

template <class T, class X>
void launch_depthwise_conv2d_rows(const X* x, const T* weight, const T* bias, const T* d_y, Compute<T>* d_pre, T* y,
                                  const DepthwiseGeometry& geometry, Activation activation, bool turned,
                                  cudaStream_t stream) {
  const DepthwiseSizes g = depthwise_sizes(geometry);
  if (g.planes == 0) return;
  dispatch_filter_size<T>(g, [&](auto k) {
    EVKERNELS_LAUNCH((depthwise_conv2d_rows_kernel<decltype(k)::value, X, T>), depthwise_grid(g),
                     dim3(kDepthwiseThreads), 0, stream, x, weight, bias, d_y, d_pre, y, g, activation, turned);
  });
}

template <class T>
void launch_depthwise_conv2d_forward(const T* x, const T* weight, const T* bias, T* y, const DepthwiseGeometry& g,
                                     Activation activation, cudaStream_t stream) {
  launch_depthwise_conv2d_rows<T>(x, weight, bias, nullptr, nullptr, y, g, activation, false, stream);
}

// The gradient at the pre-activation.
template <class T>
void launch_depthwise_conv2d_backward_activation(const T* x, const T* weight, const T* bias, const T* d_y,
                                                 Compute<T>* d_pre, const DepthwiseGeometry& g, Activation activation,
                                                 cudaStream_t stream) {
  launch_depthwise_conv2d_rows<T>(x, weight, bias, d_y, d_pre, nullptr, g, activation, false, stream);
}

// From d_pre where there was an activation, else from d_y.
template <class T>
void launch_depthwise_conv2d_backward_input(const T* d_y, const Compute<T>* d_pre, const T* weight, T* d_x,
                                            const DepthwiseGeometry& g, cudaStream_t stream) {
  DepthwiseGeometry back = g;
  back.height = g.out_height, back.width = g.out_width;
  back.out_height = g.height, back.out_width = g.width;
  if (g.stride == 1) {
    back.padding = g.span() - 1 - g.padding;
    const auto turned = [&](const auto* d) {
      launch_depthwise_conv2d_rows<T>(d, weight, nullptr, nullptr, nullptr, d_x, back, Activation::kNone, true, stream);
    };
    return d_pre ? turned(d_pre) : turned(d_y);
  }
  const DepthwiseSizes sizes = depthwise_sizes(back);
  if (sizes.planes == 0) return;
  EVKERNELS_LAUNCH(depthwise_conv2d_backward_input_kernel<T>, depthwise_grid(sizes), dim3(kDepthwiseThreads), 0, stream,
                   d_y, d_pre, weight, d_x, sizes);
}

}  // namespace evkernels
