// The basis functions of time.
#pragma once

namespace evkernels {

enum class TimeBasis { kCosine, kGaussian, kMexicanHat, kMorlet, kSteppedCubic };

}  // namespace evkernels
