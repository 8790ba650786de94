// Time surfaces on the CPU: tensors to pointers, threads, registration. The loops are in loops.inl.
//
// Threads share the rows of all windows, so no two write the same cell and the result does not depend on their number.
// A thread that has some of a window's rows reads all of that window's events to find its own. At 640x480 and 1e6
// events that takes 0.2 (int64) to 0.3 (float32) of the time of one thread with AVX-512. Half of the rows take 0.58
// (int64) and 0.63 (float32) of the time of all, because more of them fit in the level-2 cache.
//
// Without AVX-512 half of the rows took 0.7 to 1.1. There, where large windows are fewer than threads, rows are shared
// by a sample of the events, and events of 16-bit coordinates are chosen as common/event_rows.inl says: half of the
// rows take 0.5 to 0.65. On two busy cores of a Zen 3 two threads are 0.9 (1e7 events) to 2 times as
// fast as one (`python -m benchmarks threads time_surface`). A surface for
// each thread and the maximum of them would take more memory, and the time of clearing and reading them.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <numeric>

#include "common/event_rows.h"
#include "time_surface/host.h"

#define EVKERNELS_LOOPS "time_surface/loops.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

// Work per task, in events and cells: about 30 us, well above the cost of waking a thread.
constexpr int64_t kGrain = 32768;

struct Decay {
  const int64_t* at;  // [B], or null for each window's latest time
  float tau;
  bool linear;
};

// Fills `out`: times for S = int64_t, and what is left of the events for S = float. Returns how many were dropped.
template <class T, class S>
int64_t fill(const T* t, const EventColumns& events, const PixelMap& map, const SurfaceShape& shape,
             const std::vector<int64_t>& offsets, const int64_t* previous, const Decay& decay, S* out) {
  constexpr bool kDecays = std::is_same_v<S, float>;
  const int64_t windows = static_cast<int64_t>(offsets.size()) - 1;
  const int64_t plane = shape.height * shape.width;
  const int64_t window_size = shape.polarities * plane;
  // Calls keep(at, from, surface, latest), which keeps a window's events on its surface, ages being counted from `at`.
  // Events sorted by time are kept once: the last one has the latest time.
  const auto fill_window = [&](int64_t w, const auto& keep) {
    const int64_t* const from = previous ? previous + w * window_size : nullptr;
    int64_t at = 0, latest = kNever;
    if (decay.at) {
      at = decay.at[w];
    } else if (kDecays) {
      at = offsets[w] < offsets[w + 1] ? t[offsets[w + 1] - 1] : kNever;
      if (from) at = EVKERNELS_CALL(maximum, from, window_size, at);
    }
    const int64_t outside = keep(at, from, out + w * window_size, latest);
    if (!kDecays || decay.at || latest <= at) return outside;
    return keep(latest, from, out + w * window_size, latest);
  };
  const auto decay_rows = [&](int64_t w, int64_t first_row, int64_t last_row) {
    if constexpr (kDecays) {
      for (int64_t k = 0; k < shape.polarities; ++k) {
        EVKERNELS_CALL(decay_cells, out + w * window_size + k * plane + first_row * shape.width,
                       (last_row - first_row) * shape.width, decay.tau, decay.linear);
      }
    }
  };

  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), kMostRowThreads);
  if (windows < threads && offsets.back() >= windows * kSharedWindow && has_sensor_rows(events, map) &&
      current_isa() < Isa::kAvx512) {
    int64_t dropped = 0;
    for (int64_t w = 0; w < windows; ++w) {
      const std::vector<int64_t> borders =
          share_rows(events, shape.height, offsets[w], offsets[w + 1], shape.polarities * shape.width / 4, threads);
      dropped += fill_window(w, [&](int64_t at, const int64_t* from, S* surface, int64_t& latest) {
        std::vector<int64_t> latest_of(threads, kNever), outside(threads, 0);
        torch::stable::parallel_for(0, threads, 1, [&](int64_t k, int64_t last) {
          if (borders[k] == borders[last]) return;
          outside[k] = EVKERNELS_CALL(fill_shared_rows, t, events, map, shape, offsets[w], offsets[w + 1], borders[k],
                                      borders[last], at, from, surface, latest_of[k]);
        });
        latest = *std::max_element(latest_of.begin(), latest_of.end());
        return std::accumulate(outside.begin(), outside.end(), int64_t{0});
      });
      if (!kDecays) continue;
      torch::stable::parallel_for(0, threads, 1,
                                  [&](int64_t k, int64_t last) { decay_rows(w, borders[k], borders[last]); });
    }
    return dropped;
  }
  const int64_t rows = windows * shape.height;
  const int64_t work = std::max<int64_t>(1, offsets.back() + windows * window_size / 4);
  const int64_t grain = std::max<int64_t>(1, kGrain * rows / work);
  std::atomic<int64_t> dropped{0};
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t w = begin / shape.height;
      const int64_t first_row = begin - w * shape.height;
      const int64_t last_row = std::min(end - w * shape.height, shape.height);
      const int64_t outside = fill_window(w, [&](int64_t at, const int64_t* from, S* surface, int64_t& latest) {
        return EVKERNELS_CALL(fill_rows, t, events, map, shape, offsets[w], offsets[w + 1], first_row, last_row, at,
                              from, surface, latest);
      });
      // Of the threads that share a window, one counts.
      if (first_row == 0) dropped += outside;
      decay_rows(w, first_row, last_row);
      begin = w * shape.height + last_row;
    }
  });
  return dropped;
}

// The surface goes into `out`; returns how many events were dropped.
template <class S>
Tensor fill_surface(Tensor x, Tensor y, Tensor t, Tensor p, const std::optional<Tensor>& offsets,
                    std::optional<Tensor> pixels, std::optional<Tensor> previous, const SurfaceShape& shape,
                    const Decay& decay, Tensor& out) {
  const EventColumns events = event_columns(x, y, t, p);
  const PixelMap map = pixel_map(pixels, shape.height, shape.width);
  const std::vector<int64_t> windows = window_offsets(offsets, x.numel());
  bring_surface(previous, surface_sizes(offsets, shape));
  Tensor dropped = torch::stable::empty({}, ScalarType::Long, std::nullopt, x.device());
  const auto fill_by_time = [&](auto time) {
    using T = typename decltype(time)::type;
    return fill(data<T>(t), events, map, shape, windows, data<int64_t>(previous), decay, mutable_data<S>(out));
  };
  *mutable_data<int64_t>(dropped) =
      events.t_type == IntType::kInt64 ? fill_by_time(Type<int64_t>{}) : fill_by_time(Type<int32_t>{});
  return dropped;
}

SurfaceShape shape_of_out(const Tensor& out, const std::optional<Tensor>& offsets, ScalarType dtype) {
  check_out(out, offsets, window_count(offsets));
  STD_TORCH_CHECK(out.scalar_type() == dtype, "out must be int64, or float32 with a decay");
  return surface_shape(out.size(-3), out.size(-2), out.size(-1));
}

Decay decay_of(std::optional<Tensor>& at, const std::optional<Tensor>& offsets, double tau, bool linear) {
  if (at.has_value()) {
    STD_TORCH_CHECK(at->scalar_type() == ScalarType::Long && at->dim() == 1 && at->size(0) == window_count(offsets),
                    "at must be int64 [B]");
    at = in_layout(*at, MemoryFormat::Contiguous);
  }
  return {data<int64_t>(at), static_cast<float>(tau), linear};
}

std::tuple<Tensor, Tensor> time_surface(Tensor x, Tensor y, Tensor t, Tensor p, std::optional<Tensor> offsets,
                                        std::optional<Tensor> surface, int64_t polarities, int64_t height,
                                        int64_t width) {
  const SurfaceShape shape = surface_shape(polarities, height, width);
  Tensor result = torch::stable::empty(surface_sizes(offsets, shape), ScalarType::Long, std::nullopt, x.device());
  const Tensor dropped = fill_surface<int64_t>(x, y, t, p, offsets, std::nullopt, surface, shape, Decay{}, result);
  return {result, dropped};
}

Tensor time_surface_into(Tensor x, Tensor y, Tensor t, Tensor p, std::optional<Tensor> offsets,
                         std::optional<Tensor> pixels, std::optional<Tensor> surface, Tensor out) {
  const SurfaceShape shape = shape_of_out(out, offsets, ScalarType::Long);
  return fill_surface<int64_t>(x, y, t, p, offsets, pixels, surface, shape, Decay{}, out);
}

std::tuple<Tensor, Tensor> decayed_time_surface(Tensor x, Tensor y, Tensor t, Tensor p, std::optional<Tensor> offsets,
                                                std::optional<Tensor> surface, std::optional<Tensor> at,
                                                int64_t polarities, int64_t height, int64_t width, double tau,
                                                bool linear) {
  const SurfaceShape shape = surface_shape(polarities, height, width);
  const Decay decay = decay_of(at, offsets, tau, linear);
  Tensor result = torch::stable::empty(surface_sizes(offsets, shape), ScalarType::Float, std::nullopt, x.device());
  const Tensor dropped = fill_surface<float>(x, y, t, p, offsets, std::nullopt, surface, shape, decay, result);
  return {result, dropped};
}

Tensor decayed_time_surface_into(Tensor x, Tensor y, Tensor t, Tensor p, std::optional<Tensor> offsets,
                                 std::optional<Tensor> pixels, std::optional<Tensor> surface, std::optional<Tensor> at,
                                 Tensor out, double tau, bool linear) {
  const SurfaceShape shape = shape_of_out(out, offsets, ScalarType::Float);
  const Decay decay = decay_of(at, offsets, tau, linear);
  return fill_surface<float>(x, y, t, p, offsets, pixels, surface, shape, decay, out);
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) {
  m.impl("time_surface", TORCH_BOX(&evkernels::time_surface));
  m.impl("decayed_time_surface", TORCH_BOX(&evkernels::decayed_time_surface));
  m.impl("time_surface_into", TORCH_BOX(&evkernels::time_surface_into));
  m.impl("decayed_time_surface_into", TORCH_BOX(&evkernels::decayed_time_surface_into));
}
