// Which instruction set the CPU kernels use: the best one of this processor, lowered by EVKERNELS_CPU_ISA or at run
// time.
#pragma once

namespace evkernels {

enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The set in use. Read once per operator call.
Isa current_isa();

}  // namespace evkernels
