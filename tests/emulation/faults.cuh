// Small kernels that test the emulation itself: each right as it stands, or with one planted fault chosen by a template
// argument, so that the right twin shows that only the fault is reported.
#pragma once

#include "common/device_math.cuh"
#include "common/tensor_core.cuh"

namespace evkernels {
namespace {

constexpr int kThreads = 256;

enum class Fault : int { kNone = 0, kFirst = 1, kSecond = 2, kThird = 3, kFourth = 4 };

// Sum of each block's threads: shuffles inside a warp, shared memory between warps. First fault: no barrier between.
// Second: the barrier only where a condition that differs within the block holds.
template <Fault kFault>
__global__ void __launch_bounds__(kThreads) block_sum_kernel(const int* __restrict__ x, int* __restrict__ sums) {
  __shared__ int warp_sums[kThreads / 32];
  int sum = x[blockIdx.x * kThreads + threadIdx.x];
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(0xFFFFFFFFu, sum, distance);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  if (kFault == Fault::kNone) __syncthreads();
  if (kFault == Fault::kSecond && threadIdx.x < 100) __syncthreads();
  if (threadIdx.x == 0) {
    sum = 0;
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += warp_sums[warp];
    sums[blockIdx.x] = sum;
  }
  // The next block must not overwrite warp_sums; also the place at which a divergent barrier is noticed.
  __syncthreads();
}

// Threads beyond `count` return before the barrier, which CUDA allows since Volta.
__global__ void early_return_kernel(int* __restrict__ out, int count) {
  __shared__ int value;
  if (static_cast<int>(threadIdx.x) >= count) return;
  if (threadIdx.x == 0) value = count;
  __syncthreads();
  out[threadIdx.x] = value;
}

// One column per operation, see test_warp_and_block_operations. First fault: half a warp stays away from a shuffle that
// names all lanes. Second: a lane that is not in its own mask. Third: a width that is no power of two.
// Fourth: lane 0 names lanes 0 and 1, lane 1 names lanes 0 to 2.
template <Fault kFault>
__global__ void operations_kernel(int* __restrict__ out) {
  constexpr unsigned kAll = 0xFFFFFFFFu;
  const int thread = threadIdx.x, lane = thread % 32;
  int* const row = out + thread * 12;
  row[0] = __shfl_sync(kAll, thread, 5);
  row[1] = __shfl_sync(kAll, thread, 3, 8);
  row[2] = __shfl_up_sync(kAll, thread, 3, 16);
  row[3] = __shfl_down_sync(kAll, thread, 3, 16);
  row[4] = __shfl_xor_sync(kAll, thread, 9);
  row[5] = static_cast<int>(__ballot_sync(kAll, lane % 3 == 0));
  row[6] = __any_sync(kAll, thread == 40) + 2 * __all_sync(kAll, thread >= 32);
  // The halves of a warp take part in different operations at the same time.
  if (lane < 16)
    row[7] = __shfl_xor_sync(0x0000FFFFu, thread, 1);
  else
    row[7] = __shfl_xor_sync(0xFFFF0000u, thread, 2);
  row[8] = __syncthreads_count(thread % 5 == 0);
  row[9] = __syncthreads_or(thread == 63) + 2 * __syncthreads_and(thread != 63);
  if (kFault == Fault::kFirst && lane < 16) __syncwarp();
  if (kFault == Fault::kSecond) __syncwarp(1u);
  if (kFault == Fault::kThird) row[0] = __shfl_sync(kAll, thread, 0, 12);
  if (kFault == Fault::kFourth) row[0] = __shfl_sync(lane == 0 ? 0x3u : lane == 1 ? 0x7u : ~0x3u, thread, lane);
  row[10] = static_cast<int>(__shfl_sync(kAll, static_cast<double>(thread), lane ^ 1));
  __syncwarp();
  // Of a lane that does not take part: undefined, so anything but a plausible value.
  row[11] = lane < 16 ? __shfl_sync(0x0000FFFFu, thread, 20) : 0;
}

// Reverses each warp's values through shared memory. First fault: no __syncwarp, as if lanes ran in lockstep.
template <Fault kFault>
__global__ void reverse_kernel(const int* __restrict__ x, int* __restrict__ out) {
  __shared__ int values[kThreads];
  const int thread = threadIdx.x;
  values[thread] = x[thread];
  if (kFault == Fault::kNone) __syncwarp();
  out[thread] = values[thread ^ 31];
}

// Rotates a block's values through memory of one element per thread. Faults: one element beyond the end of global
// (first), dynamic shared (second), static shared memory (third).
template <Fault kFault>
__global__ void rotate_kernel(const int* __restrict__ x, int* __restrict__ out) {
  EVKERNELS_DYNAMIC_SHARED(int, dynamic);
  __shared__ int fixed[kThreads];
  const int thread = threadIdx.x;
  const int next = thread + 1;
  dynamic[thread] = x[kFault == Fault::kFirst ? next : next % kThreads];
  __syncthreads();
  // Through a pointer: an index into the array itself would be caught by the undefined-behaviour sanitizer already.
  int* const view = fixed;
  view[thread] = dynamic[kFault == Fault::kSecond ? next : next % kThreads];
  __syncthreads();
  out[thread] = view[kFault == Fault::kThird ? next : next % kThreads];
}

// What a thread finds in dynamic shared memory that nobody wrote; every block leaves zeros behind.
__global__ void uninitialised_kernel(float* __restrict__ out) {
  EVKERNELS_DYNAMIC_SHARED(float, values);
  out[blockIdx.x * blockDim.x + threadIdx.x] = values[threadIdx.x];
  values[threadIdx.x] = 0.0f;
}

// 16-byte copies; x or out begin where the caller says.
__global__ void copy_kernel(const float* __restrict__ x, float* __restrict__ out) {
  store_packed(out + threadIdx.x * 4, load_packed<4>(x + threadIdx.x * 4));
}

// First fault: compare-and-swap without a retry, which loses counts when another thread comes between.
template <Fault kFault>
__global__ void atomics_kernel(const int* __restrict__ x, int count, int* __restrict__ integers,
                               float* __restrict__ floats, double* __restrict__ doubles,
                               unsigned long long* __restrict__ wide) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  atomicAdd(integers, x[i]);
  atomicMax(integers + 1, x[i]);
  atomicMin(integers + 2, x[i]);
  atomicOr(integers + 3, 1 << (x[i] & 15));
  atomicAdd(floats, static_cast<float>(x[i]));
  atomicAdd(doubles, static_cast<double>(x[i]));
  atomicAdd(wide, static_cast<unsigned long long>(x[i]) << 32);
  atomicMax(wide + 1, static_cast<unsigned long long>(x[i]) << 32);
  // Counts threads, saturating at 255.
  int seen = integers[4], expected;
  do {
    expected = seen;
    seen = atomicCAS(integers + 4, expected, expected < 255 ? expected + 1 : 255);
  } while (kFault == Fault::kNone && seen != expected);
}

// out[16, 8] += a[16, 16] b[8, 16]^T for each warp's own matrices. First fault: a lane stays away.
template <class T, Fault kFault>
__global__ void multiply_kernel(const T* __restrict__ a, const T* __restrict__ b, float* __restrict__ out) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, pair = lane % 4 * 2;
  if (kFault == Fault::kFirst && threadIdx.x == 33) return;
  uint32_t a_words[4], b_words[2];
  const auto load = [](const T* from) { return load_packed<1>(reinterpret_cast<const uint32_t*>(from))[0]; };
  for (int i = 0; i < 4; ++i) a_words[i] = load(a + (warp * 16 + group + i % 2 * 8) * 16 + pair + i / 2 * 8);
  for (int i = 0; i < 2; ++i) b_words[i] = load(b + (warp * 8 + group) * 16 + pair + i * 8);
  float sums[4];
  float* const to = out + (warp * 16 + group) * 8 + pair;
  for (int i = 0; i < 4; ++i) sums[i] = to[i / 2 * 64 + i % 2];
  // Twice, so that a second product meets the fragments of the first.
  multiply_matrices<T>(sums, a_words, b_words);
  multiply_matrices<T>(sums, a_words, b_words);
  for (int i = 0; i < 4; ++i) to[i / 2 * 64 + i % 2] = sums[i];
}

// When each thread came to the counter.
__global__ void order_kernel(int* __restrict__ counter, int* __restrict__ order) {
  order[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1);
}

template <class T>
__global__ void to_float_kernel(const std::uint16_t* __restrict__ bits, float* __restrict__ out, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) out[i] = to_float(T{bits[i]});
}

template <class T>
__global__ void from_float_kernel(const float* __restrict__ x, std::uint16_t* __restrict__ bits, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < count) bits[i] = from_float<T>(x[i]).bits;
}

// Rows of out: exp, sigmoid, tanh.
template <class T>
__global__ void math_kernel(const T* __restrict__ x, T* __restrict__ out, int count) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= count) return;
  out[i] = device_math::exp(x[i]);
  out[count + i] = device_math::sigmoid(x[i]);
  out[2 * count + i] = device_math::tanh(x[i]);
}

}  // namespace
}  // namespace evkernels
