// Stacked event histograms on the CPU: tensors to pointers, threads, registration. The loops are in loops.inl.

#include <torch/csrc/stable/library.h>

#include "common/event_tasks.h"
#include "event_histogram/host.h"

#define EVKERNELS_LOOPS "event_histogram/loops.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

template <class T, class C>
int64_t fill(const T* t, const EventColumns& events, const HistogramShape& shape, const std::vector<int64_t>& offsets,
             C* out) {
  const int64_t window_size = 2 * shape.bins * shape.height * shape.width;
  return fill_windows(offsets, shape.bins, window_size,
                      [&](int64_t w, int64_t first_bin, int64_t last_bin, bool sorted, int64_t& dropped) {
                        C* const window = out + w * window_size;
                        if (sorted)
                          return EVKERNELS_CALL(fill_sorted, t, events, shape, offsets[w], offsets[w + 1], first_bin,
                                                last_bin, window, dropped);
                        EVKERNELS_CALL(fill_unsorted, t, events, shape, offsets[w], offsets[w + 1], first_bin, last_bin,
                                       window, dropped);
                        return true;
                      });
}

std::tuple<Tensor, Tensor> event_histogram(Tensor x, Tensor y, Tensor t, Tensor p, std::optional<Tensor> offsets,
                                           int64_t bins, int64_t height, int64_t width, int64_t cutoff, int64_t bits) {
  const EventColumns events = event_columns(x, y, t, p);
  const HistogramShape shape = histogram_shape(bins, height, width, cutoff, bits);
  const std::vector<int64_t> windows = window_offsets(offsets, x.numel());
  Tensor histogram =
      torch::stable::empty(histogram_sizes(offsets, shape), counter_dtype(bits), std::nullopt, x.device());
  Tensor dropped = torch::stable::empty({}, ScalarType::Long, std::nullopt, x.device());
  const auto fill_by_counter = [&](auto time, auto counter) {
    using T = typename decltype(time)::type;
    using C = typename decltype(counter)::type;
    return fill(data<T>(t), events, shape, windows, mutable_data<C>(histogram));
  };
  const auto fill_by_time = [&](auto time) {
    if (bits == 8) return fill_by_counter(time, Type<uint8_t>{});
    return bits == 16 ? fill_by_counter(time, Type<int16_t>{}) : fill_by_counter(time, Type<int32_t>{});
  };
  *mutable_data<int64_t>(dropped) =
      events.t_type == IntType::kInt64 ? fill_by_time(Type<int64_t>{}) : fill_by_time(Type<int32_t>{});
  return {histogram, dropped};
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) { m.impl("event_histogram", TORCH_BOX(&evkernels::event_histogram)); }
