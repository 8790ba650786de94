// evkernels._host: what PyTorch's dispatcher is bad at, bound with pybind11 and free of torch headers: facts of the
// build.

#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["compiler"] = __VERSION__;
        info["cuda_archs"] = EVKERNELS_CUDA_ARCHS;
#ifdef NDEBUG
        info["debug"] = false;
#else
        info["debug"] = true;
#endif
        return info;
      },
      "Compiler, CUDA architectures in TORCH_CUDA_ARCH_LIST form (empty for a CPU build) and whether this is a debug "
      "build.");
}
