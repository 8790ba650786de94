// What the CPU and CUDA host functions of voxel_grid share: tensors to columns, conventions to numbers, the output's
// shape, the memory-safety checks. The conventions are defined in evkernels/reference/voxel_grid.py.
#pragma once

#include <string>

#include "common/event_host.h"
#include "voxel_grid/columns.h"

namespace evkernels {

inline RealType real_type(const Tensor& column) {
  if (column.scalar_type() == ScalarType::Float) return RealType::kFloat32;
  return column.scalar_type() == ScalarType::Double ? RealType::kFloat64 : RealType::kNone;
}

// Replaces the tensors by contiguous ones where they are not; they must outlive the columns.
inline VoxelColumns voxel_columns(Tensor& x, Tensor& y, Tensor& t, Tensor& p, std::optional<Tensor>& weight) {
  for (Tensor* column : {&x, &y, &t, &p}) {
    STD_TORCH_CHECK(column->dim() == 1 && column->numel() == x.numel(), "x, y, t and p must be [E] each");
    *column = in_layout(*column, MemoryFormat::Contiguous);
  }
  if (weight.has_value()) {
    STD_TORCH_CHECK(weight->dim() == 1 && weight->numel() == x.numel() && real_type(*weight) != RealType::kNone,
                    "weight must be float32 or float64 [E]");
    weight = in_layout(*weight, MemoryFormat::Contiguous);
  }
  const auto type = [](const Tensor& column) {
    return real_type(column) == RealType::kNone ? int_type(column) : IntType::kInt64;
  };
  STD_TORCH_CHECK(real_type(x) == real_type(y), "x and y must both be integer or of one floating dtype");
  STD_TORCH_CHECK(real_type(t) != RealType::kNone || type(t) == IntType::kInt32 || type(t) == IntType::kInt64,
                  "t must be int32, int64, float32 or float64");
  STD_TORCH_CHECK(real_type(p) == RealType::kNone, "p must be an integer tensor");
  const EventColumns events{x.const_data_ptr(),
                            y.const_data_ptr(),
                            t.const_data_ptr(),
                            p.const_data_ptr(),
                            type(x),
                            type(y),
                            type(t),
                            type(p)};
  return {events, real_type(x), real_type(t), weight.has_value() ? weight->const_data_ptr() : nullptr};
}

inline VoxelShape voxel_shape(int64_t bins, int64_t height, int64_t width, const std::string& convention) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  STD_TORCH_CHECK(bins >= 1 && bins <= 1 << 24 && height >= 1 && height < kLimit && width >= 1 && width < kLimit,
                  "bins must be in [1, 2^24], height and width in [1, 2^31)");
  VoxelShape shape{bins, height, width, 1, 0, false, false, false, -1};
  if (convention == "tonic") {
    shape.fewer = 0;
  } else if (convention == "openeb") {
    shape.fewer = 0;
    shape.shift = 0.5;
    shape.is_clamped = true;
  } else if (convention == "event_utils") {
    shape.zero = 0;
  } else if (convention == "eseg" || convention == "eseg_split") {
    shape.fewer = 0;
    shape.is_hard = true;
    shape.is_split = convention == "eseg_split";
    shape.zero = 0;
  } else {
    STD_TORCH_CHECK(convention == "e2vid" || convention == "dsec", "voxel_grid has no convention ", convention);
  }
  return shape;
}

// Without offsets there is no batch dimension.
inline std::vector<int64_t> voxel_sizes(const std::optional<Tensor>& offsets, const VoxelShape& shape) {
  if (offsets.has_value()) return {window_count(offsets), shape.channels(), shape.height, shape.width};
  return {shape.channels(), shape.height, shape.width};
}

inline ScalarType grid_type(const std::optional<Tensor>& weight) {
  return weight.has_value() ? weight->scalar_type() : ScalarType::Float;
}

// Calls f(Type<grid>) for the type of the grid.
template <class F>
void dispatch_grid(const std::optional<Tensor>& weight, const F& f) {
  if (grid_type(weight) == ScalarType::Double) return f(Type<double>{});
  f(Type<float>{});
}

// Calls f(Type<time>) for the type of t.
template <class F>
void dispatch_time(const VoxelColumns& columns, const F& f) {
  if (columns.t_type == RealType::kFloat64) return f(Type<double>{});
  if (columns.t_type == RealType::kFloat32) return f(Type<float>{});
  if (columns.events.t_type == IntType::kInt32) return f(Type<int32_t>{});
  f(Type<int64_t>{});
}

}  // namespace evkernels
