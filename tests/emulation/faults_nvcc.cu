// The fault-free kernels of faults.cuh for nvcc: the same source must be CUDA as well. Compiled, never run.
#include "faults.cuh"

namespace evkernels {

void launch_all(int* integers, float* floats, double* doubles, unsigned long long* wide, std::uint16_t* bits,
                cudaStream_t stream) {
  constexpr int kCount = 1000;
  EVKERNELS_LAUNCH((block_sum_kernel<Fault::kNone>), 1, kThreads, 0, stream, integers, integers);
  EVKERNELS_LAUNCH((early_return_kernel), 1, kThreads, 0, stream, integers, kCount);
  EVKERNELS_LAUNCH((operations_kernel<Fault::kNone>), 1, 64, 0, stream, integers);
  EVKERNELS_LAUNCH((reverse_kernel<Fault::kNone>), 1, kThreads, 0, stream, integers, integers);
  EVKERNELS_LAUNCH((rotate_kernel<Fault::kNone>), 1, kThreads, kThreads * sizeof(int), stream, integers, integers);
  EVKERNELS_LAUNCH((uninitialised_kernel), 1, kThreads, kThreads * sizeof(float), stream, floats);
  EVKERNELS_LAUNCH((copy_kernel), 1, kThreads, 0, stream, floats, floats);
  EVKERNELS_LAUNCH((atomics_kernel<Fault::kNone>), grid_dimensions(4), kThreads, 0, stream, integers, kCount, integers,
                   floats, doubles, wide);
  EVKERNELS_LAUNCH((multiply_kernel<Half, Fault::kNone>), 1, kThreads, 0, stream, reinterpret_cast<Half*>(bits),
                   reinterpret_cast<Half*>(bits), floats);
  EVKERNELS_LAUNCH((multiply_kernel<BFloat16, Fault::kNone>), 1, kThreads, 0, stream, reinterpret_cast<BFloat16*>(bits),
                   reinterpret_cast<BFloat16*>(bits), floats);
  EVKERNELS_LAUNCH((order_kernel), 1, kThreads, 0, stream, integers, integers);
  EVKERNELS_LAUNCH((to_float_kernel<Half>), 4, kThreads, 0, stream, bits, floats, kCount);
  EVKERNELS_LAUNCH((to_float_kernel<BFloat16>), 4, kThreads, 0, stream, bits, floats, kCount);
  EVKERNELS_LAUNCH((from_float_kernel<Half>), 4, kThreads, 0, stream, floats, bits, kCount);
  EVKERNELS_LAUNCH((from_float_kernel<BFloat16>), 4, kThreads, 0, stream, floats, bits, kCount);
  EVKERNELS_LAUNCH((math_kernel<float>), 4, kThreads, 0, stream, floats, floats, kCount);
  EVKERNELS_LAUNCH((math_kernel<double>), 4, kThreads, 0, stream, doubles, doubles, kCount);
}

}  // namespace evkernels
