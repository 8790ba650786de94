// What the CPU and CUDA host functions of event_histogram share: tensors to columns, the output's shape, the
// memory-safety checks. The argument checks that users meet are in evkernels/ops/event_histogram.py.
#pragma once

#include <vector>

#include "common/tensor.h"
#include "event_histogram/columns.h"

namespace evkernels {

inline IntType int_type(const Tensor& column) {
  switch (column.scalar_type()) {
    case ScalarType::Char:
      return IntType::kInt8;
    case ScalarType::Bool:
    case ScalarType::Byte:
      return IntType::kUInt8;
    case ScalarType::Short:
      return IntType::kInt16;
    case ScalarType::UInt16:
      return IntType::kUInt16;
    case ScalarType::Int:
      return IntType::kInt32;
    case ScalarType::UInt32:
      return IntType::kUInt32;
    case ScalarType::Long:
      return IntType::kInt64;
    case ScalarType::UInt64:
      return IntType::kUInt64;
    default:
      STD_TORCH_CHECK(false, "x, y, t and p must be integer tensors");
  }
}

// Replaces the tensors by contiguous ones where they are not; they must outlive the columns.
inline EventColumns event_columns(Tensor& x, Tensor& y, Tensor& t, Tensor& p) {
  for (Tensor* column : {&x, &y, &t, &p}) {
    STD_TORCH_CHECK(column->dim() == 1 && column->numel() == x.numel(), "x, y, t and p must be [E] each");
    *column = in_layout(*column, MemoryFormat::Contiguous);
  }
  const EventColumns events{x.const_data_ptr(), y.const_data_ptr(), t.const_data_ptr(), p.const_data_ptr(),
                            int_type(x),        int_type(y),        int_type(t),        int_type(p)};
  STD_TORCH_CHECK(events.t_type == IntType::kInt32 || events.t_type == IntType::kInt64, "t must be int32 or int64");
  return events;
}

inline HistogramShape histogram_shape(int64_t bins, int64_t height, int64_t width, int64_t cutoff) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  STD_TORCH_CHECK(bins >= 1 && bins <= 1 << 24 && height >= 1 && height < kLimit && width >= 1 && width < kLimit,
                  "bins must be in [1, 2^24], height and width in [1, 2^31)");
  STD_TORCH_CHECK(cutoff >= 1 && cutoff <= 255, "count_cutoff must be in [1, 255]");
  return {bins, height, width, static_cast<uint8_t>(cutoff)};
}

inline int64_t window_count(const std::optional<Tensor>& offsets) {
  if (!offsets.has_value()) return 1;
  STD_TORCH_CHECK(offsets->dim() == 1 && offsets->numel() >= 1 && offsets->scalar_type() == ScalarType::Long,
                  "offsets must be int64 [B + 1]");
  return offsets->numel() - 1;
}

// Without offsets there is no batch dimension.
inline std::vector<int64_t> histogram_sizes(const std::optional<Tensor>& offsets, const HistogramShape& shape) {
  std::vector<int64_t> sizes{2 * shape.bins, shape.height, shape.width};
  if (offsets.has_value()) sizes.insert(sizes.begin(), window_count(offsets));
  return sizes;
}

}  // namespace evkernels
