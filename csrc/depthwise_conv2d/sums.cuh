// The gradients of weights and bias of a depthwise convolution: sums over whole images. Threads walk down strips with a
// sum per tap in registers; warp and block add them up into one partial sum per tap and block, and a second kernel adds
// up those in order. No atomics: the same bits on every run. Integer instructions bound it on paper, 2.3
// (channels_last) to 2.8 times the time of the bytes; with the padding and the stride looked at for every tap it
// was 4.8 to 5.5.
#pragma once

#include "depthwise_conv2d/strips.cuh"

namespace evkernels {

// How the sums for the gradients of weights and bias are shared out.
struct DepthwiseSums {
  int walks;      // strips that one thread walks, one after the other
  int blocks;     // of one plane and group of channels
  int lanes;      // neighbouring threads on neighbouring channels, a power of two; the others are on other strips
  int64_t parts;  // partial sums per filter and tap
};

// Sums of d * x over a block's strips for every tap, and of d alone behind the last; for K = 0 block by block for one
// tap each. sums [filters, taps, parts].
template <int K, class T>
__global__ void __launch_bounds__(kDepthwiseThreads, K == 5 ? 3 : 4)
    depthwise_conv2d_backward_sums_kernel(const T* __restrict__ d_y, const Compute<T>* __restrict__ d_pre,
                                          const T* __restrict__ x, Compute<T>* __restrict__ sums, DepthwiseSizes g,
                                          DepthwiseSums s) {
  using A = Compute<T>;
  constexpr int kTaps = K ? K * K + 1 : 1, kWarps = kDepthwiseThreads / 32;
  __shared__ A of_warps[kTaps * kDepthwiseThreads];
  const unsigned taps = g.k * g.k + 1, groups = (g.channels + s.lanes - 1) / s.lanes;
  unsigned block = blockIdx.x;
  const int only_tap = K ? 0 : block % taps;
  if (K == 0) block /= taps;
  const int part = block % s.blocks;
  block /= s.blocks;
  const int channel = block % groups * s.lanes, plane = block / groups;
  const int lane = threadIdx.x % s.lanes, slots = kDepthwiseThreads / s.lanes;
  const int64_t x_row = static_cast<int64_t>(g.width) * g.channels,
                d_row = static_cast<int64_t>(g.out_width) * g.channels;
  A partial[kTaps] = {};
#pragma unroll 1
  for (int walk = 0; walk < s.walks; ++walk) {
    const unsigned unit = (part * s.walks + walk) * slots + threadIdx.x / s.lanes;
    const DepthwiseStrip at = depthwise_strip(plane, unit / g.out_width, unit % g.out_width, channel + lane, g);
    if (at.channel >= g.channels || at.first >= g.out_height) break;
    const int left = at.column * g.stride - g.padding;
    int64_t from = at.input(at.first, g), of = at.output(at.first, g);
    if constexpr (K > 0) {
      // gradient[r] is of the output that the current input row meets at tap row r, if bit r of `met` says that there
      // is one: zeros would make NaN of infinite pixels.
      A gradient[K] = {};
      unsigned met = 0;
      const bool all_inside = left >= 0 && left + K <= g.width;  // of the columns
      const int height = (at.last - at.first) * g.stride, top = at.first * g.stride - g.padding;
      const T* line = x + from;
      int until_next = 0;
#pragma unroll 1
      for (int step = 0; step < height - g.stride + K; ++step, line += x_row) {
#pragma unroll
        for (int r = K - 1; r > 0; --r) gradient[r] = gradient[r - 1];
        met = met * 2 & ((1u << K) - 1);
        if (until_next-- == 0 && step < height) {
          until_next = g.stride - 1;
          gradient[0] = depthwise_gradient(d_y, d_pre, of);
          partial[K * K] += gradient[0];
          met |= 1;
          of += d_row;
        }
        if (static_cast<unsigned>(top + step) >= static_cast<unsigned>(g.height)) continue;
        if (all_inside && met == (1u << K) - 1) {
          A value[K];
#pragma unroll
          for (int c = 0; c < K; ++c) value[c] = to_float(line[c * g.channels]);
#pragma unroll
          for (int t = 0; t < K * K; ++t) partial[t] += gradient[t / K] * value[t % K];
        } else {
#pragma unroll
          for (int c = 0; c < K; ++c) {
            if (static_cast<unsigned>(left + c) >= static_cast<unsigned>(g.width)) continue;
            const A value = to_float(line[c * g.channels]);
#pragma unroll
            for (int r = 0; r < K; ++r) {
              if (met >> r & 1) partial[r * K + c] += gradient[r] * value;
            }
          }
        }
      }
    } else {
      const int r = only_tap / g.k * g.dilation, c = only_tap % g.k * g.dilation;
      const bool is_bias = only_tap == g.k * g.k;
      if (!is_bias && (left + c < 0 || left + c >= g.width)) continue;
#pragma unroll 1
      for (int i = at.first; i < at.last; ++i, of += d_row, from += g.stride * x_row) {
        const int row = i * g.stride - g.padding + r;
        if (is_bias) {
          partial[0] += depthwise_gradient(d_y, d_pre, of);
        } else if (row >= 0 && row < g.height) {
          partial[0] += depthwise_gradient(d_y, d_pre, of) * to_float(x[from + r * x_row + c * g.channels]);
        }
      }
    }
  }
#pragma unroll 1
  for (int distance = 16; distance >= s.lanes; distance /= 2) {
#pragma unroll
    for (int t = 0; t < kTaps; ++t) partial[t] += __shfl_xor_sync(0xffffffffu, partial[t], distance);
  }
  const int warp = threadIdx.x / 32;
  if (static_cast<int>(threadIdx.x % 32) < s.lanes) {
#pragma unroll
    for (int t = 0; t < kTaps; ++t) of_warps[(t * kWarps + warp) * s.lanes + lane] = partial[t];
  }
  __syncthreads();
#pragma unroll 1
  for (int e = threadIdx.x; e < kTaps * s.lanes; e += kDepthwiseThreads) {
    if (channel + lane >= g.channels) continue;
    A total = 0;
    for (int w = 0; w < kWarps; ++w) total += of_warps[(e / s.lanes * kWarps + w) * s.lanes + lane];
    const int filter = g.channels == 1 ? plane % g.filters : channel + lane;
    const int sample = g.channels == 1 ? plane / g.filters : plane;
    const int64_t row = static_cast<int64_t>(filter) * taps + only_tap + e / s.lanes;
    sums[row * s.parts + static_cast<int64_t>(sample) * s.blocks + part] = total;
  }
}

// Adds up the parts of every tap of every filter, a warp for each. d_weight or d_bias may be null.
template <class T>
__global__ void __launch_bounds__(kDepthwiseThreads)
    depthwise_conv2d_reduce_kernel(const Compute<T>* __restrict__ sums, T* __restrict__ d_weight,
                                   T* __restrict__ d_bias, int filters, int taps, int64_t parts) {
  const int e = blockIdx.x * (kDepthwiseThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  const int filter = e / taps, tap = e % taps;
  if (filter >= filters) return;
  double total = 0;
  for (int64_t part = lane; part < parts; part += 32) total += sums[e * parts + part];
  for (int distance = 16; distance > 0; distance /= 2) total += __shfl_xor_sync(0xffffffffu, total, distance);
  if (lane != 0) return;
  const T value = from_float<T>(static_cast<Compute<T>>(total));
  if (tap < taps - 1 && d_weight) d_weight[static_cast<int64_t>(filter) * (taps - 1) + tap] = value;
  if (tap == taps - 1 && d_bias) d_bias[filter] = value;
}

inline DepthwiseSums depthwise_sums(const DepthwiseSizes& g) {
  int lanes = 1;
  while (lanes < 32 && lanes < g.channels) lanes *= 2;
  const int64_t threads = depthwise_strips(g) * lanes;
  // Partial sums cost memory traffic: up to 8 strips per thread share one, where there are threads enough.
  const int64_t spare = threads * g.planes * ceil_div(g.channels, lanes) / kDepthwiseManyThreads;
  const int walks = static_cast<int>(spare < 1 ? 1 : spare < 8 ? spare : 8);
  const int blocks = static_cast<int>(ceil_div(threads, walks * kDepthwiseThreads));
  return {walks, blocks, lanes, static_cast<int64_t>(g.channels == 1 ? g.planes / g.filters : g.planes) * blocks};
}
inline int64_t depthwise_sums_size(const DepthwiseGeometry& g) {
  return g.filters * (g.k * g.k + 1) * depthwise_sums(depthwise_sizes(g)).parts;
}

// sums: depthwise_sums_size(g) elements of scratch memory.
template <class T>
void launch_depthwise_conv2d_backward_weight(const T* d_y, const Compute<T>* d_pre, const T* x, Compute<T>* sums,
                                             T* d_weight, T* d_bias, const DepthwiseGeometry& geometry,
                                             cudaStream_t stream) {
  const DepthwiseSizes g = depthwise_sizes(geometry);
  const DepthwiseSums s = depthwise_sums(g);
  const int taps = g.k * g.k + 1;
  const int64_t blocks = g.planes * ceil_div(g.channels, s.lanes) * s.blocks;
  if (blocks > 0) {
    dispatch_filter_size<T>(g, [&](auto k) {
      constexpr int K = decltype(k)::value;
      EVKERNELS_LAUNCH((depthwise_conv2d_backward_sums_kernel<K, T>), grid_dimensions(blocks * (K ? 1 : taps)),
                       dim3(kDepthwiseThreads), 0, stream, d_y, d_pre, x, sums, g, s);
    });
  }
  constexpr int kWarps = kDepthwiseThreads / 32;
  EVKERNELS_LAUNCH((depthwise_conv2d_reduce_kernel<T>),
                   grid_dimensions(ceil_div(static_cast<int64_t>(g.filters) * taps, kWarps)), dim3(kDepthwiseThreads),
                   0, stream, sums, d_weight, d_bias, g.filters, taps, s.parts);
}

}  // namespace evkernels
