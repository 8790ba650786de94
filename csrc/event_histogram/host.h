// What the CPU and CUDA host functions of event_histogram share: the output's shape and its memory-safety checks.
#pragma once

#include "common/event_host.h"
#include "event_histogram/columns.h"

namespace evkernels {

// Counters have 8, 16 or 32 bits.
inline HistogramShape histogram_shape(int64_t bins, int64_t height, int64_t width, int64_t cutoff, int64_t bits) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  STD_TORCH_CHECK(bins >= 1 && bins <= 1 << 24 && height >= 1 && height < kLimit && width >= 1 && width < kLimit,
                  "bins must be in [1, 2^24], height and width in [1, 2^31)");
  STD_TORCH_CHECK(bits == 8 || bits == 16 || bits == 32, "counters must have 8, 16 or 32 bits");
  // Only bytes are unsigned.
  STD_TORCH_CHECK(cutoff >= 1 && cutoff < int64_t{1} << (bits == 8 ? 8 : bits - 1),
                  "count_cutoff must be at least 1 and no more than the counters hold");
  return {bins, height, width, static_cast<int32_t>(cutoff)};
}

inline ScalarType counter_dtype(int64_t bits) {
  return bits == 8 ? ScalarType::Byte : bits == 16 ? ScalarType::Short : ScalarType::Int;
}

// Of the counters that the CPU writes in place; float32 counts like 24 bits and a sign.
inline int64_t counter_bits(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Byte:
      return 8;
    case ScalarType::Short:
      return 16;
    case ScalarType::Int:
    case ScalarType::Float:
      return 32;
    default:
      STD_TORCH_CHECK(false, "out must be uint8, int16, int32 or float32");
  }
}

// Without offsets there is no batch dimension.
inline std::vector<int64_t> histogram_sizes(const std::optional<Tensor>& offsets, const HistogramShape& shape) {
  std::vector<int64_t> sizes{2 * shape.bins, shape.height, shape.width};
  if (offsets.has_value()) sizes.insert(sizes.begin(), window_count(offsets));
  return sizes;
}

}  // namespace evkernels
