// Position of each gate's block along the channels of `gates`.
#pragma once

struct LstmGateOrder {
  int i, f, g, o;
};
