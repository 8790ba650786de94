// A complete miniature op in the layout of csrc/<op>: y = a * x + y, packs of 16 bytes where the pointers allow it.
#pragma once

#include "common/device.cuh"

namespace evkernels {
namespace {

constexpr int kThreads = 128;

template <class T, int N>
__global__ void __launch_bounds__(kThreads) saxpy_kernel(Compute<T> a, const T* __restrict__ x, const T* __restrict__ y,
                                                         T* __restrict__ out, std::int64_t count) {
  const std::int64_t first = (static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N;
  if (first >= count) return;
  Packed<T, N> x_pack = load_packed<N>(x + first);
  const Packed<T, N> y_pack = load_packed<N>(y + first);
#pragma unroll
  for (int i = 0; i < N; ++i) x_pack[i] = from_float<T>(a * to_float(x_pack[i]) + to_float(y_pack[i]));
  store_packed(out + first, x_pack);
}

template <class T, int N>
void launch_saxpy(Compute<T> a, const T* x, const T* y, T* out, std::int64_t count, cudaStream_t stream) {
  if (count == 0) return;
  const dim3 grid = grid_dimensions(ceil_div(count, kThreads * N));
  EVKERNELS_LAUNCH((saxpy_kernel<T, N>), grid, kThreads, 0, stream, a, x, y, out, count);
}

}  // namespace
}  // namespace evkernels
