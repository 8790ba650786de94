// evkernels._host: what PyTorch's dispatcher is bad at, bound with pybind11 and free of torch headers: facts of the
// build.

#include <pybind11/pybind11.h>

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
}
