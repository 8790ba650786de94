// Compiles one loop file per instruction set, each in a namespace of its own: define EVKERNELS_LOOPS, then include
// this.
//
// Target attributes instead of compiler flags keep the rest of the library, and every inline function of the standard
// headers, on the baseline instruction set: a header function compiled for AVX-512 could be the one copy that the
// linker keeps, and would crash on older processors. For the same reason loop files include nothing and define only
// static or always-inline functions. On processors other than x86-64 only the baseline exists; the compiler maps its
// 16-byte vectors to NEON and the like.
//
// EVKERNELS_CALL(function, arguments...) calls the copy for the instruction set in use. On processors with AMX that is
// AVX-512's; an op with a form for AMX also defines EVKERNELS_AMX_LOOPS, a file compiled once, in the namespace amx,
// behind common/amx.inl, and chooses between the two itself.

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "common/half.h"
#include "common/isa.h"

// Of lambdas that loops call: they are compiled inside them.
#define EVKERNELS_LOOP_BODY __attribute__((always_inline))

namespace evkernels {
namespace {

namespace baseline {
#define EVKERNELS_LANES 4
#include "common/vec.inl"
#include EVKERNELS_LOOPS
#undef EVKERNELS_LANES
}  // namespace baseline

#if defined(__x86_64__)

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
#define EVKERNELS_LANES 8
#include "common/vec.inl"
#include EVKERNELS_LOOPS
#undef EVKERNELS_LANES
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
#define EVKERNELS_LANES 16
#include "common/vec.inl"
#include EVKERNELS_LOOPS
#undef EVKERNELS_LANES
}  // namespace avx512
#pragma GCC pop_options

#if defined(EVKERNELS_AMX_LOOPS)
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512bf16")
namespace amx {
#define EVKERNELS_LANES 16
#include "common/vec.inl"
#include "common/amx.inl"
#include EVKERNELS_AMX_LOOPS
#undef EVKERNELS_LANES
}  // namespace amx
#pragma GCC pop_options
#endif

#define EVKERNELS_CALL(function, ...)                            \
  (current_isa() >= Isa::kAvx512 ? avx512::function(__VA_ARGS__) \
   : current_isa() == Isa::kAvx2 ? avx2::function(__VA_ARGS__)   \
                                 : baseline::function(__VA_ARGS__))

#else
#define EVKERNELS_CALL(function, ...) baseline::function(__VA_ARGS__)
#endif

}  // namespace
}  // namespace evkernels
