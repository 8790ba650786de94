// Voxel grids on the GPU: clear, first and last time of every window, add; and convert, if integers were added.
//
// One thread adds one event. Floats are added by atomics in any order. For deterministic results multiples of 2^-32 are
// added in 64-bit integers, where the order does not matter, and converted by a last pass: twice the memory traffic of
// the additions, room for 2^31 events per cell, and rounding below that of float32. That needs values of at most 1, so
// events with weights are not added this way.
// Columns keep their types; the switch on the type is the same for all threads.
#pragma once

#include "common/device_math.cuh"
#include "common/event_windows.cuh"
#include "voxel_grid/columns.h"

namespace evkernels {
namespace device_math {
#include "voxel_grid/math.inl"
}  // namespace device_math

constexpr double kFixedPoint = 4294967296.0;

__device__ __forceinline__ double load_real(const void* column, RealType type, int64_t e) {
  return type == RealType::kFloat32 ? static_cast<double>(static_cast<const float*>(column)[e])
                                    : static_cast<const double*>(column)[e];
}

// Times as integers in their order: floating ones as their bits, mirrored where negative.
__device__ __forceinline__ int64_t mirrored(int64_t bits) {
  return bits >= 0 ? bits : static_cast<int64_t>(static_cast<uint64_t>(INT64_MIN) - static_cast<uint64_t>(bits));
}
__device__ __forceinline__ int64_t ordered_bits(double value) {
  int64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return mirrored(bits);
}
__device__ __forceinline__ double from_ordered_bits(int64_t ordered) {
  const int64_t bits = mirrored(ordered);
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

template <class Sum>
__global__ void __launch_bounds__(kEventThreads)
    voxel_grid_clear_kernel(EventWindows windows, Sum* __restrict__ sums, int64_t cells, unsigned long long* dropped) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kEventThreads + threadIdx.x;
  if (k < cells) sums[k] = 0;
  if (k < windows.count) {
    windows.first[k] = INT64_MAX;
    windows.last[k] = INT64_MIN;
  }
  if (k == 0) *dropped = 0;
}

// Floating times, one event per thread: rare enough for two atomics each.
static __global__ void __launch_bounds__(kEventThreads)
    voxel_grid_real_times_kernel(VoxelColumns columns, EventWindows windows, int64_t count) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kEventThreads + threadIdx.x;
  if (e >= count) return;
  const int64_t window = window_of_event(windows, e);
  const long long t = ordered_bits(load_real(columns.events.t, columns.t_type, e));
  atomicMin(windows.first + window, t);
  atomicMax(windows.last + window, t);
}

template <class R>
__device__ __forceinline__ void add_value(R* sums, int64_t cell, R value) {
  atomicAdd(sums + cell, value);
}
template <class R>
__device__ __forceinline__ void add_value(unsigned long long* sums, int64_t cell, R value) {
  const double scaled = static_cast<double>(value) * kFixedPoint;
  const long long rounded = static_cast<long long>(scaled + (scaled < 0 ? -0.5 : 0.5));
  atomicAdd(sums + cell, static_cast<unsigned long long>(rounded));
}

// The index below a coordinate and the share of the index above; false if it touches no index in [0, limit).
template <class R>
__device__ __forceinline__ bool place_in_image(const void* column, IntType type, RealType real, int64_t e,
                                               int64_t limit, int64_t& index, R& past) {
  past = 0;
  if (real == RealType::kNone) {
    index = load_integer(column, type, e);
    return index >= 0 && index < limit;
  }
  const double coordinate = load_real(column, real, e);
  if (!(coordinate > -1 && coordinate < static_cast<double>(limit))) return false;
  index = coordinate < 0 ? -1 : static_cast<int64_t>(coordinate);
  past = static_cast<R>(coordinate - static_cast<double>(index));
  return true;
}

template <class R, class Sum>
__global__ void __launch_bounds__(kEventThreads)
    voxel_grid_add_kernel(VoxelColumns columns, EventWindows windows, VoxelShape shape, int64_t count, Sum* sums,
                          unsigned long long* dropped) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kEventThreads + threadIdx.x;
  if (e >= count) return;
  const EventColumns& events = columns.events;
  const int64_t p = load_integer(events.p, events.p_type, e);
  int64_t x = 0, y = 0;
  R past_x, past_y;
  if (!place_in_image(events.x, events.x_type, columns.xy_type, e, shape.width, x, past_x) ||
      !place_in_image(events.y, events.y_type, columns.xy_type, e, shape.height, y, past_y) || p < -1 || p > 1) {
    atomicAdd(dropped, 1ull);
    return;
  }
  const int64_t window = window_of_event(windows, e);
  double since, difference;
  if (columns.t_type == RealType::kNone) {
    const int64_t t0 = windows.first[window];
    since = static_cast<double>(wrapping_difference(load_integer(events.t, events.t_type, e), t0));
    difference = static_cast<double>(wrapping_difference(windows.last[window], t0));
  } else {
    const double t0 = from_ordered_bits(windows.first[window]);
    since = load_real(events.t, columns.t_type, e) - t0;
    difference = from_ordered_bits(windows.last[window]) - t0;
  }
  const double position =
      device_math::position_in_time(since, static_cast<double>(shape.bins) - shape.fewer,
                                    difference > 0 ? difference : 1, shape.shift, static_cast<double>(shape.bins) + 1);
  const int32_t bin = device_math::lower_bin(position, shape);
  const R past = static_cast<R>(device_math::upper_share(position, bin, shape));
  R value = static_cast<R>(device_math::value_of_polarity(static_cast<int32_t>(p), shape));
  if (columns.weight != nullptr) value *= static_cast<const R*>(columns.weight)[e];
  const int64_t channel = window * shape.channels() + (shape.is_split && p <= 0 ? shape.bins : 0);
  const int neighbours = columns.xy_type == RealType::kNone ? 1 : 2;
  for (int upper = 0; upper < (shape.is_hard ? 1 : 2); ++upper) {
    if (bin + upper < 0 || bin + upper >= shape.bins) continue;
    const R of_time = upper ? value * past : value * (1 - past);
    for (int below = 0; below < neighbours; ++below) {
      if (y + below < 0 || y + below >= shape.height) continue;
      const R of_row = below ? of_time * past_y : of_time * (1 - past_y);
      for (int right = 0; right < neighbours; ++right) {
        if (x + right < 0 || x + right >= shape.width) continue;
        const int64_t row = (channel + bin + upper) * shape.height + y + below;
        add_value(sums, row * shape.width + x + right, right ? of_row * past_x : of_row * (1 - past_x));
      }
    }
  }
}

static __global__ void __launch_bounds__(kEventThreads)
    voxel_grid_convert_kernel(const unsigned long long* __restrict__ sums, float* __restrict__ grid, int64_t cells) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kEventThreads + threadIdx.x;
  if (k < cells) grid[k] = static_cast<float>(static_cast<double>(static_cast<long long>(sums[k])) / kFixedPoint);
}

// `sums` are the grid itself, or integers to be converted to it.
template <class R, class Sum>
void launch_voxel_grid(const VoxelColumns& columns, const EventWindows& windows, const VoxelShape& shape, int64_t count,
                       Sum* sums, int64_t* dropped, cudaStream_t stream) {
  const int64_t cells = windows.count * shape.channels() * shape.height * shape.width;
  const int64_t clear_threads = cells > windows.count ? cells : windows.count;
  unsigned long long* const drops = reinterpret_cast<unsigned long long*>(dropped);
  EVKERNELS_LAUNCH((voxel_grid_clear_kernel<Sum>), grid_dimensions(ceil_div(clear_threads + 1, kEventThreads)),
                   dim3(kEventThreads), 0, stream, windows, sums, cells, drops);
  if (count == 0 || windows.count == 0) return;
  const dim3 blocks = grid_dimensions(ceil_div(count, kEventThreads));
  if (columns.t_type == RealType::kNone) {
    launch_event_times(columns.events, windows, count, stream);
  } else {
    EVKERNELS_LAUNCH(voxel_grid_real_times_kernel, blocks, dim3(kEventThreads), 0, stream, columns, windows, count);
  }
  EVKERNELS_LAUNCH((voxel_grid_add_kernel<R, Sum>), blocks, dim3(kEventThreads), 0, stream, columns, windows, shape,
                   count, sums, drops);
}

inline void launch_voxel_grid_convert(const unsigned long long* sums, float* grid, int64_t cells, cudaStream_t stream) {
  if (cells == 0) return;
  EVKERNELS_LAUNCH(voxel_grid_convert_kernel, grid_dimensions(ceil_div(cells, kEventThreads)), dim3(kEventThreads), 0,
                   stream, sums, grid, cells);
}

}  // namespace evkernels
