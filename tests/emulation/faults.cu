// Launches the kernels of faults.cuh: torch.ops.evkernels_faults.<kernel>, `fault` 0 is the right one. Emulation only:
// the tensors are the CPU's. Every op writes into tensors that the caller made.
#include "common/cuda_host.h"
#include "common/rows.cuh"
#include "depthwise_conv2d/strips.cuh"
#include "faults.cuh"

namespace evkernels {
namespace {

using torch::stable::Tensor;

template <class T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

dim3 grid_for(std::int64_t count) { return grid_dimensions(ceil_div(count, kThreads)); }

void block_sum(const Tensor& x, const Tensor& sums, std::int64_t fault) {
  const dim3 grid = grid_dimensions(sums.numel());
  const int* const in = pointer<int>(x);
  int* const out = pointer<int>(sums);
  if (fault == 1)
    EVKERNELS_LAUNCH((block_sum_kernel<Fault::kFirst>), grid, kThreads, 0, nullptr, in, out);
  else if (fault == 2)
    EVKERNELS_LAUNCH((block_sum_kernel<Fault::kSecond>), grid, kThreads, 0, nullptr, in, out);
  else
    EVKERNELS_LAUNCH((block_sum_kernel<Fault::kNone>), grid, kThreads, 0, nullptr, in, out);
}

void early_return(const Tensor& out, std::int64_t count) {
  EVKERNELS_LAUNCH((early_return_kernel), 1, kThreads, 0, nullptr, pointer<int>(out), static_cast<int>(count));
}

void operations(const Tensor& out, std::int64_t fault) {
  int* const rows = pointer<int>(out);
  if (fault == 1)
    EVKERNELS_LAUNCH((operations_kernel<Fault::kFirst>), 1, 64, 0, nullptr, rows);
  else if (fault == 2)
    EVKERNELS_LAUNCH((operations_kernel<Fault::kSecond>), 1, 64, 0, nullptr, rows);
  else if (fault == 3)
    EVKERNELS_LAUNCH((operations_kernel<Fault::kThird>), 1, 64, 0, nullptr, rows);
  else if (fault == 4)
    EVKERNELS_LAUNCH((operations_kernel<Fault::kFourth>), 1, 64, 0, nullptr, rows);
  else
    EVKERNELS_LAUNCH((operations_kernel<Fault::kNone>), 1, 64, 0, nullptr, rows);
}

void reverse(const Tensor& x, const Tensor& out, std::int64_t fault) {
  const int* const in = pointer<int>(x);
  int* const to = pointer<int>(out);
  if (fault == 1)
    EVKERNELS_LAUNCH((reverse_kernel<Fault::kFirst>), 1, kThreads, 0, nullptr, in, to);
  else
    EVKERNELS_LAUNCH((reverse_kernel<Fault::kNone>), 1, kThreads, 0, nullptr, in, to);
}

void rotate(const Tensor& x, const Tensor& out, std::int64_t fault) {
  constexpr std::size_t kShared = kThreads * sizeof(int);
  const int* const in = pointer<int>(x);
  int* const to = pointer<int>(out);
  if (fault == 1)
    EVKERNELS_LAUNCH((rotate_kernel<Fault::kFirst>), 1, kThreads, kShared, nullptr, in, to);
  else if (fault == 2)
    EVKERNELS_LAUNCH((rotate_kernel<Fault::kSecond>), 1, kThreads, kShared, nullptr, in, to);
  else if (fault == 3)
    EVKERNELS_LAUNCH((rotate_kernel<Fault::kThird>), 1, kThreads, kShared, nullptr, in, to);
  else
    EVKERNELS_LAUNCH((rotate_kernel<Fault::kNone>), 1, kThreads, kShared, nullptr, in, to);
}

void uninitialised(const Tensor& out) {
  EVKERNELS_LAUNCH((uninitialised_kernel), grid_dimensions(out.size(0)), static_cast<unsigned>(out.size(1)),
                   out.size(1) * sizeof(float), nullptr, pointer<float>(out));
}

void copy(const Tensor& x, const Tensor& out) {
  EVKERNELS_LAUNCH((copy_kernel), 1, static_cast<unsigned>(x.numel() / 4), 0, nullptr, pointer<float>(x),
                   pointer<float>(out));
}

void atomics(const Tensor& x, const Tensor& integers, const Tensor& floats, const Tensor& doubles, const Tensor& wide,
             std::int64_t fault) {
  const int count = static_cast<int>(x.numel());
  const auto launch = [&](auto kernel) {
    EVKERNELS_LAUNCH((kernel), grid_for(count), kThreads, 0, nullptr, pointer<int>(x), count, pointer<int>(integers),
                     pointer<float>(floats), pointer<double>(doubles), pointer<unsigned long long>(wide));
  };
  if (fault == 1)
    launch(atomics_kernel<Fault::kFirst>);
  else
    launch(atomics_kernel<Fault::kNone>);
}

void multiply(const Tensor& a, const Tensor& b, const Tensor& out, bool half, std::int64_t fault) {
  const unsigned threads = static_cast<unsigned>(32 * a.size(0));
  const auto launch = [&](auto kernel, auto zero) {
    using T = decltype(zero);
    EVKERNELS_LAUNCH((kernel), 1, threads, 0, nullptr, pointer<T>(a), pointer<T>(b), pointer<float>(out));
  };
  if (fault == 1)
    launch(multiply_kernel<Half, Fault::kFirst>, Half{});
  else if (half)
    launch(multiply_kernel<Half, Fault::kNone>, Half{});
  else
    launch(multiply_kernel<BFloat16, Fault::kNone>, BFloat16{});
}

void order(const Tensor& counter, const Tensor& order) {
  EVKERNELS_LAUNCH((order_kernel), grid_for(order.numel()), kThreads, 0, nullptr, pointer<int>(counter),
                   pointer<int>(order));
}

// Launches with extents given by the test; `granted` bytes of dynamic shared memory are asked for first unless 0.
void launch_limits(std::int64_t grid_y, std::int64_t block_x, std::int64_t shared_bytes, std::int64_t granted) {
  if (granted)
    EVKERNELS_CHECK_CUDA(cudaFuncSetAttribute(early_return_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                              static_cast<int>(granted)));
  const dim3 grid(1, static_cast<unsigned>(grid_y)), block(static_cast<unsigned>(block_x));
  EVKERNELS_LAUNCH((early_return_kernel), grid, block, static_cast<std::size_t>(shared_bytes), nullptr,
                   static_cast<int*>(nullptr), 0);
}

// The right stream, or the null stream where another is current.
void on_stream(const Tensor& out, bool null) {
  const DeviceScope scope(out);
  EVKERNELS_LAUNCH((early_return_kernel), 1, kThreads, 0, null ? nullptr : scope.stream(), pointer<int>(out), kThreads);
}

// Where a kernel finds element `e` of the state in block 0 of a tensor of four blocks, rows of `inner` elements.
std::int64_t gate_offset(std::int64_t e, std::int64_t inner, std::int64_t total) {
  return block_offset<4>(e, inner, total);
}

// Where thread `thread` of block `block` begins with four elements each.
std::int64_t row_element(std::int64_t block, std::int64_t thread) {
  blockIdx.x = static_cast<unsigned>(block);
  threadIdx.x = static_cast<unsigned>(thread);
  return first_element<4>();
}

// Input and output offsets of a pixel of a depthwise convolution, 3 x 3 with padding 1.
std::tuple<std::int64_t, std::int64_t> depthwise_offsets(std::int64_t plane, std::int64_t row, std::int64_t column,
                                                         std::int64_t channel, std::int64_t planes, std::int64_t height,
                                                         std::int64_t width, std::int64_t channels) {
  const DepthwiseSizes g = depthwise_sizes({planes, channels, channels, height, width, height, width, 3, 1, 1, 1});
  const DepthwiseStrip at{static_cast<int>(plane),  static_cast<int>(row),     static_cast<int>(row) + 1,
                          static_cast<int>(column), static_cast<int>(channel), 0};
  return {at.input(static_cast<int>(row), g), at.output(static_cast<int>(row), g)};
}

void helper_limits(std::int64_t x, std::int64_t y, std::int64_t z) { grid_dimensions(x, y, z); }

void to_float_bits(const Tensor& bits, const Tensor& out, bool half) {
  const int count = static_cast<int>(bits.numel());
  const auto launch = [&](auto kernel) {
    EVKERNELS_LAUNCH((kernel), grid_for(count), kThreads, 0, nullptr, pointer<std::uint16_t>(bits), pointer<float>(out),
                     count);
  };
  if (half)
    launch(to_float_kernel<Half>);
  else
    launch(to_float_kernel<BFloat16>);
}

void from_float_bits(const Tensor& x, const Tensor& bits, bool half) {
  const int count = static_cast<int>(bits.numel());
  const auto launch = [&](auto kernel) {
    EVKERNELS_LAUNCH((kernel), grid_for(count), kThreads, 0, nullptr, pointer<float>(x), pointer<std::uint16_t>(bits),
                     count);
  };
  if (half)
    launch(from_float_kernel<Half>);
  else
    launch(from_float_kernel<BFloat16>);
}

void math(const Tensor& x, const Tensor& out) {
  const int count = static_cast<int>(x.numel());
  const auto launch = [&](auto kernel, auto zero) {
    using T = decltype(zero);
    EVKERNELS_LAUNCH((kernel), grid_for(count), kThreads, 0, nullptr, pointer<T>(x), pointer<T>(out), count);
  };
  if (x.element_size() == 8)
    launch(math_kernel<double>, 0.0);
  else
    launch(math_kernel<float>, 0.0f);
}

STABLE_TORCH_LIBRARY(evkernels_faults, m) {
  m.def("block_sum(Tensor x, Tensor(a!) sums, int fault) -> ()");
  m.def("early_return(Tensor(a!) out, int count) -> ()");
  m.def("operations(Tensor(a!) out, int fault) -> ()");
  m.def("reverse(Tensor x, Tensor(a!) out, int fault) -> ()");
  m.def("rotate(Tensor x, Tensor(a!) out, int fault) -> ()");
  m.def("uninitialised(Tensor(a!) out) -> ()");
  m.def("copy(Tensor x, Tensor(a!) out) -> ()");
  m.def(
      "atomics(Tensor x, Tensor(a!) integers, Tensor(b!) floats, Tensor(c!) doubles, Tensor(d!) wide, int fault)"
      " -> ()");
  m.def("multiply(Tensor a, Tensor b, Tensor(a!) out, bool half, int fault) -> ()");
  m.def("order(Tensor(a!) counter, Tensor(b!) order) -> ()");
  m.def("launch_limits(int grid_y, int block_x, int shared_bytes, int granted) -> ()");
  m.def("on_stream(Tensor(a!) out, bool null) -> ()");
  m.def("gate_offset(int e, int inner, int total) -> int");
  m.def("row_element(int block, int thread) -> int");
  m.def(
      "depthwise_offsets(int plane, int row, int column, int channel, int planes, int height, int width, int channels)"
      " -> (int, int)");
  m.def("helper_limits(int x, int y, int z) -> ()");
  m.def("to_float(Tensor bits, Tensor(a!) out, bool half) -> ()");
  m.def("from_float(Tensor x, Tensor(a!) bits, bool half) -> ()");
  m.def("math(Tensor x, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(evkernels_faults, CompositeExplicitAutograd, m) {
  m.impl("block_sum", TORCH_BOX(&block_sum));
  m.impl("early_return", TORCH_BOX(&early_return));
  m.impl("operations", TORCH_BOX(&operations));
  m.impl("reverse", TORCH_BOX(&reverse));
  m.impl("rotate", TORCH_BOX(&rotate));
  m.impl("uninitialised", TORCH_BOX(&uninitialised));
  m.impl("copy", TORCH_BOX(&copy));
  m.impl("atomics", TORCH_BOX(&atomics));
  m.impl("multiply", TORCH_BOX(&multiply));
  m.impl("order", TORCH_BOX(&order));
  m.impl("launch_limits", TORCH_BOX(&launch_limits));
  m.impl("on_stream", TORCH_BOX(&on_stream));
  m.impl("gate_offset", TORCH_BOX(&gate_offset));
  m.impl("row_element", TORCH_BOX(&row_element));
  m.impl("depthwise_offsets", TORCH_BOX(&depthwise_offsets));
  m.impl("helper_limits", TORCH_BOX(&helper_limits));
  m.impl("to_float", TORCH_BOX(&to_float_bits));
  m.impl("from_float", TORCH_BOX(&from_float_bits));
  m.impl("math", TORCH_BOX(&math));
}

}  // namespace
}  // namespace evkernels
