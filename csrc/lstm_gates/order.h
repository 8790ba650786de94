// Position of each gate's block along the channels of `gates`.
#pragma once

namespace evkernels {

struct LstmGateOrder {
  int i, f, g, o;
};

}  // namespace evkernels
