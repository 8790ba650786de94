// Which instruction set the CPU kernels use: the best one of this processor, lowered by EVKERNELS_CPU_ISA or at run
// time.
#pragma once

namespace evkernels {

// AMX is AVX-512 with tiles of bfloat16 and vectors that convert to it; most kernels have no form of their own for it.
enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2, kAmx = 3 };

// The set in use. Read once per operator call.
Isa current_isa();

}  // namespace evkernels
