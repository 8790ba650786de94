// Chooses the instruction set once, the best one or what EVKERNELS_CPU_ISA says, and lets tests lower it. Compiled into
// each of the two modules, _C and _host, which choose for themselves.

#include "common/isa_choice.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <atomic>
#include <cstdlib>
#include <stdexcept>

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

Isa parse(const std::string& name) {
  if (name == "best") return best_isa();
  for (int k = 0; k < 4; ++k) {
    if (name != kNames[k]) continue;
    if (k > static_cast<int>(best_isa())) {
      throw std::runtime_error("instruction set " + name + " is not available on this processor, whose best is " +
                               isa_name(best_isa()));
    }
    return static_cast<Isa>(k);
  }
  throw std::runtime_error("instruction set must be baseline, avx2, avx512, amx or best, got " + name);
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

}  // namespace

Isa current_isa() { return isa().load(std::memory_order_relaxed); }

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa best_isa() {
#if defined(__x86_64__)
  static const bool amx = __builtin_cpu_supports("x86-64-v4") && has_amx();
  if (amx) return Isa::kAmx;
  if (__builtin_cpu_supports("x86-64-v4")) return Isa::kAvx512;
  if (__builtin_cpu_supports("x86-64-v3")) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

std::string set_isa(const std::string& name) {
  const std::string previous = isa_name(current_isa());
  isa() = parse(name);
  return previous;
}

}  // namespace evkernels
