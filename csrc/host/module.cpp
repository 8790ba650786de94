// evkernels._host: what PyTorch's dispatcher is bad at, bound with pybind11 and free of torch headers: facts of the
// build, the accumulator of event streams, the instruction set of its loops.

#include <pybind11/pybind11.h>

#include "common/isa_choice.h"
#include "host/event_accumulator.h"

namespace py = pybind11;

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "gcc " __VERSION__;
#endif

#ifdef NDEBUG
constexpr bool kDebug = false;
#else
constexpr bool kDebug = true;
#endif

PYBIND11_MODULE(_host, m) {
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = kCompiler;
        info["torch"] = EVKERNELS_TORCH;
        info["cuda_archs"] = EVKERNELS_CUDA_ARCHS;
        info["debug"] = kDebug;
        return info;
      },
      "Facts of the build: compiler, torch built against, CUDA architectures in TORCH_CUDA_ARCH_LIST form (empty "
      "for a CPU build), whether this is a debug build.");
  m.def("set_cpu_isa", &evkernels::set_isa, pybind11::arg("name"),
        "Chooses the instruction set of this module's loops; returns the name of the one before.");
  evkernels::bind_event_accumulator(m);
}
