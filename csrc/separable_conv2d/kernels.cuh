// Depthwise-separable convolution on the GPU where it does not go to the tensor cores (tensor_cores.cuh): float32,
// whose products they would round, float64, filters other than 3 x 3, and channels that are no multiple of 16.
//
// One block takes kSide output pixels and kSide output channels.
// It goes through the input channels in steps of kDepth: the block's threads compute the step's depthwise result,
// activated, into shared memory, load the step's pointwise weights beside it, and each thread adds their product to
// kEach x kEach sums in registers. The depthwise result never reaches global memory; blocks of other output channels
// compute it again. Pixels are numbered through all samples. In channels_last neighbouring threads take neighbouring
// channels, in NCHW neighbouring pixels, in both phases, so that their accesses join.
#pragma once

#include "common/device.cuh"
#include "separable_conv2d/activated.cuh"
#include "separable_conv2d/shape.h"
#include "separable_conv2d/tensor_cores.cuh"

namespace evkernels {

constexpr int kSeparableSide = 64, kSeparableDepth = 16, kSeparableEach = 4;
constexpr int kSeparableThreads = (kSeparableSide / kSeparableEach) * (kSeparableSide / kSeparableEach);

// An output pixel: the offset of its sample's first element in x, over C, and its window's corner, perhaps outside.
struct SeparablePixel {
  int64_t sample;
  int64_t top, left;
  bool exists;
};

__device__ __forceinline__ SeparablePixel separable_pixel(const SeparableShape& s, int64_t pixel) {
  const int64_t line = pixel / s.out_width, sample = line / s.out_height;
  return {sample, (line - sample * s.out_height) * s.stride - s.padding,
          (pixel - line * s.out_width) * s.stride - s.padding, pixel < s.batch * s.out_height * s.out_width};
}

template <bool kChannelsLast, class T>
__device__ Compute<T> separable_depthwise(const T* __restrict__ x, const T* __restrict__ weight, const T* bias,
                                          const SeparableShape& s, const SeparablePixel& p, int64_t c) {
  using V = Compute<T>;
  V sum = bias ? to_float(bias[c]) : V(0);
  // The compiler would unroll both for sizes that do not occur, in each of the kernel's copies of this.
#pragma unroll 1
  for (int ky = 0; ky < s.size; ++ky) {
    const int64_t row = p.top + ky;
    if (row < 0 || row >= s.height) continue;
#pragma unroll 1
    for (int kx = 0; kx < s.size; ++kx) {
      const int64_t column = p.left + kx;
      if (column < 0 || column >= s.width) continue;
      const int64_t at = kChannelsLast ? ((p.sample * s.height + row) * s.width + column) * s.channels + c
                                       : ((p.sample * s.channels + c) * s.height + row) * s.width + column;
      sum += to_float(weight[(c * s.size + ky) * s.size + kx]) * to_float(x[at]);
    }
  }
  return sum;
}

template <bool kChannelsLast, class T>
__global__ void __launch_bounds__(kSeparableThreads, 2)
    separable_conv2d_forward_kernel(const T* __restrict__ x, const T* __restrict__ depthwise_weight,
                                    const T* __restrict__ pointwise_weight, const T* __restrict__ depthwise_bias,
                                    const T* __restrict__ pointwise_bias, T* __restrict__ y, SeparableShape s) {
  using V = Compute<T>;
  constexpr int kLine = kSeparableSide / kSeparableEach;
  // One column more than is used, so that the transposed writes fall into different banks.
  __shared__ V a[kSeparableDepth][kSeparableSide + 1], w[kSeparableDepth][kSeparableSide + 1];
  const int thread = threadIdx.x;
  const int64_t first_pixel = static_cast<int64_t>(blockIdx.x) * kSeparableSide;
  const int64_t first_output = static_cast<int64_t>(blockIdx.y) * kSeparableSide;

  // The pixels and the channel (channels_last), or the pixel and the first channel (NCHW), that this thread computes.
  constexpr int kPixels = kChannelsLast ? kSeparableEach : 1, kStride = kSeparableThreads / kSeparableDepth;
  SeparablePixel pixels[kPixels];
  const int own_pixel = kChannelsLast ? thread / kSeparableDepth : thread % kSeparableSide;
  const int own_channel = kChannelsLast ? thread % kSeparableDepth : thread / kSeparableSide;
#pragma unroll
  for (int k = 0; k < kPixels; ++k) pixels[k] = separable_pixel(s, first_pixel + own_pixel + k * kStride);

  // Output pixel and channel of the sum [m][n]: pixel_lane + m * kLine, output_lane + n * kLine.
  const int pixel_lane = kChannelsLast ? thread / kLine : thread % kLine;
  const int output_lane = kChannelsLast ? thread % kLine : thread / kLine;
  V sum[kSeparableEach][kSeparableEach] = {};

  for (int64_t start = 0; start < s.channels; start += kSeparableDepth) {
#pragma unroll
    for (int k = 0; k < kSeparableEach; ++k) {
      const int channel = kChannelsLast ? own_channel : own_channel + k * (kSeparableThreads / kSeparableSide);
      const int column = kChannelsLast ? own_pixel + k * kStride : own_pixel;
      const SeparablePixel& p = pixels[kChannelsLast ? k : 0];
      const int64_t c = start + channel;
      a[channel][column] = p.exists && c < s.channels
                               ? activated(s.activation, separable_depthwise<kChannelsLast>(x, depthwise_weight,
                                                                                            depthwise_bias, s, p, c))
                               : V(0);
      const int depth = thread % kSeparableDepth, o = thread / kSeparableDepth + k * kStride;
      const bool inside = first_output + o < s.outputs && start + depth < s.channels;
      w[depth][o] = inside ? to_float(pointwise_weight[(first_output + o) * s.channels + start + depth]) : V(0);
    }
    __syncthreads();
    for (int depth = 0; depth < kSeparableDepth; ++depth) {
      V columns[kSeparableEach];
#pragma unroll
      for (int n = 0; n < kSeparableEach; ++n) columns[n] = w[depth][output_lane + n * kLine];
#pragma unroll
      for (int m = 0; m < kSeparableEach; ++m) {
        const V value = a[depth][pixel_lane + m * kLine];
#pragma unroll
        for (int n = 0; n < kSeparableEach; ++n) sum[m][n] += value * columns[n];
      }
    }
    __syncthreads();
  }

  const int64_t plane = s.out_height * s.out_width;
#pragma unroll
  for (int m = 0; m < kSeparableEach; ++m) {
    const int64_t pixel = first_pixel + pixel_lane + m * kLine;
    if (pixel >= s.batch * plane) continue;
    const int64_t sample = pixel / plane;
#pragma unroll
    for (int n = 0; n < kSeparableEach; ++n) {
      const int64_t o = first_output + output_lane + n * kLine;
      if (o >= s.outputs) continue;
      const V bias = pointwise_bias ? to_float(pointwise_bias[o]) : V(0);
      const int64_t at = kChannelsLast ? pixel * s.outputs + o : (sample * (s.outputs - 1) + o) * plane + pixel;
      y[at] = from_float<T>(activated(s.output_activation, sum[m][n] + bias));
    }
  }
}

template <class T>
void launch_separable_conv2d_forward(const T* x, const T* depthwise_weight, const T* pointwise_weight,
                                     const T* depthwise_bias, const T* pointwise_bias, T* y, const SeparableShape& s,
                                     bool channels_last, cudaStream_t stream) {
  if (s.batch == 0) return;
  if constexpr (sizeof(T) == 2) {
    if (launch_separable_conv2d_tensor(x, depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, y, s,
                                       channels_last, stream))
      return;
  }
  const dim3 grid = grid_dimensions(ceil_div(s.batch * s.out_height * s.out_width, kSeparableSide),
                                    ceil_div(s.outputs, kSeparableSide));
  if (channels_last) {
    EVKERNELS_LAUNCH((separable_conv2d_forward_kernel<true, T>), grid, dim3(kSeparableThreads), 0, stream, x,
                     depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, y, s);
  } else {
    EVKERNELS_LAUNCH((separable_conv2d_forward_kernel<false, T>), grid, dim3(kSeparableThreads), 0, stream, x,
                     depthwise_weight, pointwise_weight, depthwise_bias, pointwise_bias, y, s);
  }
}

}  // namespace evkernels
