// What the CPU and CUDA host functions of event_histogram share: the output's shape and its memory-safety checks.
#pragma once

#include "common/event_host.h"
#include "event_histogram/columns.h"

namespace evkernels {

inline HistogramShape histogram_shape(int64_t bins, int64_t height, int64_t width, int64_t cutoff) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  STD_TORCH_CHECK(bins >= 1 && bins <= 1 << 24 && height >= 1 && height < kLimit && width >= 1 && width < kLimit,
                  "bins must be in [1, 2^24], height and width in [1, 2^31)");
  STD_TORCH_CHECK(cutoff >= 1 && cutoff <= 255, "count_cutoff must be in [1, 255]");
  return {bins, height, width, static_cast<uint8_t>(cutoff)};
}

// Without offsets there is no batch dimension.
inline std::vector<int64_t> histogram_sizes(const std::optional<Tensor>& offsets, const HistogramShape& shape) {
  std::vector<int64_t> sizes{2 * shape.bins, shape.height, shape.width};
  if (offsets.has_value()) sizes.insert(sizes.begin(), window_count(offsets));
  return sizes;
}

}  // namespace evkernels
