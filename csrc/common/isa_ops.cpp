// The instruction set as operators of _C: evkernels::cpu_isa, best_cpu_isa and set_cpu_isa.

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include "common/isa_choice.h"

namespace evkernels {
namespace {

std::string cpu_isa() { return isa_name(current_isa()); }

std::string best_cpu_isa() { return isa_name(best_isa()); }

std::string set_cpu_isa(std::string name) { return set_isa(name); }

}  // namespace
}  // namespace evkernels

STABLE_TORCH_LIBRARY_FRAGMENT(evkernels, m) {
  m.def("cpu_isa() -> str");
  m.def("best_cpu_isa() -> str");
  m.def("set_cpu_isa(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(evkernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&evkernels::cpu_isa));
  m.impl("best_cpu_isa", TORCH_BOX(&evkernels::best_cpu_isa));
  m.impl("set_cpu_isa", TORCH_BOX(&evkernels::set_cpu_isa));
}
