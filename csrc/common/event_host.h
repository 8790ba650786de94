// What the host functions of the event representations share: tensors to columns, the windows of a batch, the
// memory-safety checks. The argument checks that users meet are in evkernels/ops/event_columns.py.
#pragma once

#include <algorithm>
#include <vector>

#include "common/event_columns.h"
#include "common/tensor.h"

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

// The map of a sensor onto images of height x width; replaces the tensor by a contiguous one where it is not.
inline PixelMap pixel_map(std::optional<Tensor>& map, int64_t height, int64_t width, bool takes_places = false) {
  if (!map.has_value()) return {height, width, nullptr, nullptr};
  const bool has_cells = map->dim() == 2 && map->scalar_type() == ScalarType::Int;
  const bool has_places =
      takes_places && map->dim() == 3 && map->size(2) == 2 && map->scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK((has_cells || has_places) && map->numel() > 0 && map->numel() < int64_t{1} << 31,
                  "pixel_map must be int32 [height, width] of the sensor");
  *map = in_layout(*map, MemoryFormat::Contiguous);
  return {map->size(0), map->size(1), has_cells ? data<int32_t>(*map) : nullptr,
          has_places ? data<float>(*map) : nullptr};
}

// `out` is written in place: [B, channels, height, width], or without the batch dimension if there are no offsets.
inline void check_out(const Tensor& out, const std::optional<Tensor>& offsets, int64_t windows) {
  STD_TORCH_CHECK(out.is_contiguous() && out.dim() == (offsets.has_value() ? 4 : 3) &&
                      (!offsets.has_value() || out.size(0) == windows),
                  "out must be contiguous and have the shape of the result");
}

inline int64_t window_count(const std::optional<Tensor>& offsets) {
  if (!offsets.has_value()) return 1;
  STD_TORCH_CHECK(offsets->dim() == 1 && offsets->numel() >= 1 && offsets->scalar_type() == ScalarType::Long,
                  "offsets must be int64 [B + 1]");
  return offsets->numel() - 1;
}

// Where each window begins and, as the last entry, where the last one ends: on the CPU, where the values can be looked
// at.
inline std::vector<int64_t> window_offsets(const std::optional<Tensor>& offsets, int64_t events) {
  std::vector<int64_t> values{0, events};
  if (!offsets.has_value()) return values;
  const Tensor contiguous = in_layout(*offsets, MemoryFormat::Contiguous);
  const int64_t* const first = data<int64_t>(contiguous);
  values.assign(first, first + window_count(offsets) + 1);
  STD_TORCH_CHECK(values.front() == 0 && values.back() == events && std::is_sorted(values.begin(), values.end()),
                  "offsets must start at 0, end at the number of events and never decrease");
  return values;
}

}  // namespace evkernels
