// Host side of the miniature op: tensors to pointers, stream, registration. x and y are contiguous and of one shape.
#include <torch/csrc/stable/ops.h>

#include "common/cuda_host.h"
#include "kernels.cuh"

namespace evkernels {
namespace {

template <class T>
void saxpy_pointers(double a, const void* x, const void* y, void* out, std::int64_t count, cudaStream_t stream) {
  const T* const x_values = static_cast<const T*>(x);
  const T* const y_values = static_cast<const T*>(y);
  T* const out_values = static_cast<T*>(out);
  constexpr int kPack = 16 / sizeof(T);
  if (count % kPack == 0 && can_pack<kPack>(x_values, y_values, out_values))
    launch_saxpy<T, kPack>(a, x_values, y_values, out_values, count, stream);
  else
    launch_saxpy<T, 1>(a, x_values, y_values, out_values, count, stream);
}

torch::stable::Tensor saxpy(double a, const torch::stable::Tensor& x, const torch::stable::Tensor& y) {
  STD_TORCH_CHECK(x.is_contiguous() && y.is_contiguous() && x.numel() == y.numel(), "x, y must be contiguous twins");
  const DeviceScope scope(x);
  torch::stable::Tensor out = torch::stable::empty_like(x);
  using torch::headeronly::ScalarType;
  const auto run = [&](auto pointers) {
    pointers(a, x.data_ptr(), y.data_ptr(), out.data_ptr(), x.numel(), scope.stream());
  };
  switch (x.scalar_type()) {
    case ScalarType::Float:
      run(saxpy_pointers<float>);
      break;
    case ScalarType::Double:
      run(saxpy_pointers<double>);
      break;
    case ScalarType::Half:
      run(saxpy_pointers<Half>);
      break;
    case ScalarType::BFloat16:
      run(saxpy_pointers<BFloat16>);
      break;
    default:
      STD_TORCH_CHECK(false, "x must be a floating-point tensor");
  }
  EVKERNELS_CHECK_LAUNCH();
  return out;
}

EVKERNELS_CUDA_LIBRARY(m) { m.impl("saxpy", TORCH_BOX(&saxpy)); }

}  // namespace
}  // namespace evkernels
