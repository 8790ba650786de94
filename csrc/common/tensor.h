// Tensors at the boundary of the kernels: layouts, allocation, dispatch on dtype. Shared by the CPU and CUDA host
// functions.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "common/half.h"

namespace evkernels {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4 || t.is_contiguous()) return false;
  int64_t expected = 1;
  for (const int d : {1, 3, 2, 0}) {
    if (t.size(d) == 1) continue;
    if (t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

// The layout that kernels work in and return: channels_last if the tensor is, contiguous otherwise. The Python side's
// `common_layout` makes the same choice for the shape rules.
inline MemoryFormat common_layout(const Tensor& t) {
  return is_channels_last(t) ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous;
}

// The tensor itself if it already has the layout, a copy otherwise. Asked here: a call through the dispatcher
// finds the operator by its name first.
inline Tensor in_layout(const Tensor& t, MemoryFormat layout) {
  const bool has = layout == MemoryFormat::ChannelsLast ? is_channels_last(t) : t.is_contiguous();
  return has ? t : torch::stable::contiguous(t, layout);
}

inline Tensor empty_in_layout(const Tensor& shape_of, ScalarType dtype, MemoryFormat layout) {
  return torch::stable::empty(shape_of.sizes(), dtype, std::nullopt, shape_of.device(), std::nullopt, layout);
}

// Length of the rows that elementwise kernels see: a pixel's channels in channels_last, a whole sample otherwise.
inline int64_t inner_size(const Tensor& state, MemoryFormat layout) {
  if (layout == MemoryFormat::ChannelsLast) return state.size(1);
  return state.size(0) == 0 ? 1 : state.numel() / state.size(0);
}

// Checks a gradient against the tensor it belongs to and brings it into the layout.
inline void bring_gradient(const char* name, Tensor& gradient, const Tensor& shape_of, ScalarType dtype,
                           MemoryFormat layout) {
  STD_TORCH_CHECK(gradient.dim() == shape_of.dim() && gradient.scalar_type() == dtype, name,
                  " must have the rank and dtype of the result it belongs to");
  for (int64_t d = 0; d < shape_of.dim(); ++d)
    STD_TORCH_CHECK(gradient.size(d) == shape_of.size(d), name, " must have the shape of the result it belongs to");
  gradient = in_layout(gradient, layout);
}
// Absent gradients stay absent.
inline void bring_gradient(const char* name, std::optional<Tensor>& gradient, const Tensor& shape_of, ScalarType dtype,
                           MemoryFormat layout) {
  if (gradient.has_value()) bring_gradient(name, *gradient, shape_of, dtype, layout);
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* data(const std::optional<Tensor>& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}
template <class T>
T* mutable_data(Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <class T>
struct Type {
  using type = T;
};

// Calls f(Type<dtype>) for the dtypes that kernels take.
template <class F>
void dispatch_floating(const char* op, ScalarType dtype, const F& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(Type<float>{});
    case ScalarType::Double:
      return f(Type<double>{});
    case ScalarType::BFloat16:
      return f(Type<BFloat16>{});
    case ScalarType::Half:
      return f(Type<Half>{});
    default:
      STD_TORCH_CHECK(false, op, " has no kernel for this dtype");
  }
}

// Calls f(Type<input>, Type<state>) for the allowed pairs of dtypes: equal, or a float32 state beside a 16-bit input.
template <class F>
void dispatch_input_and_state(const char* op, ScalarType input, ScalarType state, const F& f) {
  const auto with_state = [&](auto type, ScalarType own) {
    if (state == own) return f(type, type);
    STD_TORCH_CHECK(state == ScalarType::Float, op, ": the state's dtype must be the input's or float32");
    return f(type, Type<float>{});
  };
  switch (input) {
    case ScalarType::Float:
      STD_TORCH_CHECK(state == ScalarType::Float, op, ": the state beside a float32 input must be float32");
      return f(Type<float>{}, Type<float>{});
    case ScalarType::Double:
      STD_TORCH_CHECK(state == ScalarType::Double, op, ": the state beside a float64 input must be float64");
      return f(Type<double>{}, Type<double>{});
    case ScalarType::BFloat16:
      return with_state(Type<BFloat16>{}, ScalarType::BFloat16);
    case ScalarType::Half:
      return with_state(Type<Half>{}, ScalarType::Half);
    default:
      STD_TORCH_CHECK(false, op, " has no kernel for this dtype");
  }
}

}  // namespace evkernels
