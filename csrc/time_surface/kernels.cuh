// Last times per cell on the GPU, in two launches: start the surface, keep the maximum. The decay of a surface is a
// few passes of PyTorch's own, see evkernels/ops/time_surface.py.
//
// One thread takes one event and raises its cell by an atomic maximum whose old value nobody waits for; times of a cell
// meet in the level-2 cache, where a surface of 640x480 (4.9 MB) lies as a whole.
#pragma once

#include "common/event_windows.cuh"
#include "time_surface/shape.h"

namespace evkernels {

__global__ void __launch_bounds__(kEventThreads)
    time_surface_start_kernel(const int64_t* __restrict__ previous, int64_t* __restrict__ surface, int64_t cells,
                              unsigned long long* dropped) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kEventThreads + threadIdx.x;
  if (k < cells) surface[k] = previous ? previous[k] : kNever;
  if (k == 0) *dropped = 0;
}

__global__ void __launch_bounds__(kEventThreads)
    time_surface_keep_kernel(EventColumns events, EventWindows windows, SurfaceShape shape, int64_t count,
                             long long* surface, unsigned long long* dropped) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kEventThreads + threadIdx.x;
  if (e >= count) return;
  const int64_t x = load_integer(events.x, events.x_type, e), y = load_integer(events.y, events.y_type, e);
  const int64_t p = load_integer(events.p, events.p_type, e);
  if (x < 0 || x >= shape.width || y < 0 || y >= shape.height || p < -1 || p > 1) {
    atomicAdd(dropped, 1ull);
    return;
  }
  const int64_t window = window_of_event(windows, e);
  const int64_t plane = window * shape.polarities + (shape.polarities == 2 && p > 0);
  const long long t = load_integer(events.t, events.t_type, e);
  atomicMax(surface + (plane * shape.height + y) * shape.width + x, t);
}

inline void launch_time_surface(const EventColumns& events, const EventWindows& windows, const SurfaceShape& shape,
                                int64_t count, const int64_t* previous, int64_t* surface, int64_t* dropped,
                                cudaStream_t stream) {
  const int64_t cells = windows.count * shape.polarities * shape.height * shape.width;
  unsigned long long* const drops = reinterpret_cast<unsigned long long*>(dropped);
  EVKERNELS_LAUNCH(time_surface_start_kernel, grid_dimensions(ceil_div(cells + 1, kEventThreads)), dim3(kEventThreads),
                   0, stream, previous, surface, cells, drops);
  if (count == 0 || windows.count == 0) return;
  EVKERNELS_LAUNCH(time_surface_keep_kernel, grid_dimensions(ceil_div(count, kEventThreads)), dim3(kEventThreads), 0,
                   stream, events, windows, shape, count, reinterpret_cast<long long*>(surface), drops);
}

}  // namespace evkernels
