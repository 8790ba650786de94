// Chooses the instruction set once, the best one or what EVKERNELS_CPU_ISA says, and lets tests lower it:
// evkernels::cpu_isa, best_cpu_isa and set_cpu_isa.

#include "common/isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <string>

namespace evkernels {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "amx"};

// Whether this process may use tiles of bfloat16. Their state is so large that Linux wants to be asked for it, once per
// process and before the first use; threads that exist already are included.
bool has_amx() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr unsigned kTiles = 1u << 24, kTilesOfBfloat16 = 1u << 22, kVectorsOfBfloat16 = 1u << 5;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTiles) || !(d & kTilesOfBfloat16)) return false;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & kVectorsOfBfloat16)) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa best_isa() {
#if defined(__x86_64__)
  static const bool amx = __builtin_cpu_supports("x86-64-v4") && has_amx();
  if (amx) return Isa::kAmx;
  if (__builtin_cpu_supports("x86-64-v4")) return Isa::kAvx512;
  if (__builtin_cpu_supports("x86-64-v3")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

Isa parse(const std::string& name) {
  if (name == "best") return best_isa();
  for (int k = 0; k < 4; ++k) {
    if (name == kNames[k]) {
      STD_TORCH_CHECK(k <= static_cast<int>(best_isa()), "instruction set ", name,
                      " is not available on this processor, whose best is ", kNames[static_cast<int>(best_isa())]);
      return static_cast<Isa>(k);
    }
  }
  STD_TORCH_CHECK(false, "instruction set must be baseline, avx2, avx512, amx or best, got ", name);
  return Isa::kBaseline;
}

std::atomic<Isa>& isa() {
  // Decided at the first call, since an exception thrown while the library loads would end the process. The Python
  // package calls right after loading it, so that a wrong value fails there.
  static std::atomic<Isa> value = [] {
    const char* name = std::getenv("EVKERNELS_CPU_ISA");
    return name == nullptr || *name == '\0' ? best_isa() : parse(name);
  }();
  return value;
}

std::string cpu_isa() { return kNames[static_cast<int>(current_isa())]; }

std::string best_cpu_isa() { return kNames[static_cast<int>(best_isa())]; }

std::string set_cpu_isa(std::string name) {
  const std::string previous = cpu_isa();
  isa() = parse(name);
  return previous;
}

}  // namespace

Isa current_isa() { return isa().load(std::memory_order_relaxed); }

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
