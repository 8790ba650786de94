// Attention within the partitions of a map on the CPU: checks, the bias widened once, units shared by threads,
// registration. The loops are in loops.inl.

#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/tensor.h"
#include "common/workspace.h"
#include "window_attention/shape.h"

#define EVKERNELS_LOOPS "window_attention/loops.inl"
#include "common/foreach_isa.h"

namespace evkernels {
namespace {

// Units per task at least: some 20 us of work on partitions of 60 tokens.
constexpr int64_t kGrain = 4;

struct Call {
  Tensor qkv;
  std::optional<Tensor> bias;
  WindowShape shape;

  Call(const Tensor& qkv_, const std::optional<Tensor>& bias_, int64_t heads, const std::vector<int64_t>& window,
       const std::string& partition)
      : qkv(in_layout(qkv_, MemoryFormat::Contiguous)), bias(bias_) {
    STD_TORCH_CHECK(qkv.dim() == 4 && heads >= 1 && qkv.size(3) >= 1 && qkv.size(3) % (3 * heads) == 0,
                    "qkv must be [N, H, W, 3 * heads * dim]");
    STD_TORCH_CHECK(window.size() == 2 && window[0] >= 1 && window[1] >= 1 && qkv.size(1) % window[0] == 0 &&
                        qkv.size(2) % window[1] == 0,
                    "H, W must be multiples of the window's rows and columns");
    shape = {qkv.size(0), qkv.size(1), qkv.size(2),        heads, qkv.size(3) / (3 * heads),
             window[0],   window[1],   partition == "grid"};
    if (!bias.has_value()) return;
    STD_TORCH_CHECK(bias->numel() == qkv.size(3) && bias->scalar_type() == qkv.scalar_type(),
                    "bias must be [3 * heads * dim] in the dtype of qkv");
    bias = in_layout(*bias, MemoryFormat::Contiguous);
  }

  Tensor empty(int64_t channels) const {
    return torch::stable::empty({shape.batch, shape.height, shape.width, channels}, qkv.scalar_type(), std::nullopt,
                                qkv.device());
  }

  // Calls f(bias or null, begin, end, memory) for shares of all units.
  template <class T, class F>
  void for_units(bool backward, const F& f) const {
    using A = Compute<T>;
    std::vector<A> wide;
    for (int64_t c = 0; bias.has_value() && c < bias->numel(); ++c) wide.push_back(to_float(data<T>(bias)[c]));
    torch::stable::parallel_for(0, shape.units(), kGrain, [&](int64_t begin, int64_t end) {
      const auto memory = zeroed_workspace<A>(EVKERNELS_CALL(window_attention_memory<T>, shape, backward));
      f(bias.has_value() ? wide.data() : nullptr, begin, end, memory.get());
    });
  }
};

Tensor window_attention(Tensor qkv, std::optional<Tensor> bias, int64_t heads, std::vector<int64_t> window,
                        std::string partition) {
  const Call c(qkv, bias, heads, window, partition);
  Tensor out = c.empty(c.shape.channels());
  dispatch_floating("window_attention", c.qkv.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Compute<T>;
    c.for_units<T>(false, [&](const A* b, int64_t begin, int64_t end, A* memory) {
      EVKERNELS_CALL(window_attention_forward, data<T>(c.qkv), b, mutable_data<T>(out), c.shape, begin, end, memory);
    });
  });
  return out;
}

Tensor window_attention_backward(Tensor grad_output, Tensor qkv, std::optional<Tensor> bias, int64_t heads,
                                 std::vector<int64_t> window, std::string partition) {
  const Call c(qkv, bias, heads, window, partition);
  Tensor d_qkv = c.empty(3 * c.shape.channels());
  const int64_t size = c.shape.batch * c.shape.height * c.shape.width * c.shape.channels();
  STD_TORCH_CHECK(grad_output.numel() == size && grad_output.scalar_type() == c.qkv.scalar_type(),
                  "grad_output must have the shape and dtype of the result");
  grad_output = in_layout(grad_output, MemoryFormat::Contiguous);
  dispatch_floating("window_attention_backward", c.qkv.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Compute<T>;
    c.for_units<T>(true, [&](const A* b, int64_t begin, int64_t end, A* memory) {
      EVKERNELS_CALL(window_attention_backward, data<T>(grad_output), data<T>(c.qkv), b, mutable_data<T>(d_qkv),
                     c.shape, begin, end, memory);
    });
  });
  return d_qkv;
}

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_IMPL(evkernels, CPU, m) {
  m.impl("window_attention", TORCH_BOX(&evkernels::window_attention));
  m.impl("window_attention_backward", TORCH_BOX(&evkernels::window_attention_backward));
}
