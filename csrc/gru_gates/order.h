// Position of each gate's block along the channels of the pre-activations.
#pragma once

namespace evkernels {

struct GruGateOrder {
  int z, r, n;
};

struct GruResetOrder {
  int z, r;
};

}  // namespace evkernels
