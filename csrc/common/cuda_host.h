// What cuda.cu files need beside their kernels: current device and stream, launch check, registration.
//
// Only the stable ABI and cudart: the library must import where libtorch_cuda does not exist, so torch's own
// STD_CUDA_CHECK (defined there) cannot be used. Under EVKERNELS_EMULATE the ops are registered as
// evkernels_emulated::<op> for the CPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "device.cuh"

#if defined(EVKERNELS_EMULATE)
#define EVKERNELS_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(evkernels_emulated, CPU, m)
#else
#define EVKERNELS_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(evkernels, CUDA, m)
#endif

// After every launch. Reports launch errors at the call; errors inside a kernel surface at the next synchronisation.
#define EVKERNELS_CHECK_CUDA(call)                                                                    \
  do {                                                                                                \
    const cudaError_t evkernels_error = (call);                                                       \
    STD_TORCH_CHECK(evkernels_error == cudaSuccess, #call ": ", cudaGetErrorString(evkernels_error)); \
  } while (0)
#define EVKERNELS_CHECK_LAUNCH() EVKERNELS_CHECK_CUDA(cudaGetLastError())

namespace evkernels {

// Makes the tensor's device the current one for its lifetime; launches go to that device's current stream.
class DeviceScope {
 public:
#if defined(EVKERNELS_EMULATE)
  explicit DeviceScope(const torch::stable::Tensor& tensor)
      : stream_(const_cast<cudaStream_t>(reinterpret_cast<const CUstream_st*>(&tensor))) {
    std::swap(stream_, cuda_emulation::current_stream());
  }
  ~DeviceScope() { cuda_emulation::current_stream() = stream_; }
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  cudaStream_t stream() const { return cuda_emulation::current_stream(); }

 private:
  cudaStream_t stream_;  // of before
#else
  explicit DeviceScope(const torch::stable::Tensor& tensor)
      : guard_(tensor.get_device_index()),
        stream_(static_cast<cudaStream_t>(
            torch::stable::accelerator::getCurrentStream(tensor.get_device_index()).nativeHandle())) {}
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
#endif
};

}  // namespace evkernels
