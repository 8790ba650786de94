// Sizes of one call, and where the weights lie in the memory that the loops work in.
#pragma once

#include "learnable_time_embedding/shape.h"

namespace evkernels {

struct RouterShape {
  int64_t sizes[4];  // inputs, both hidden layers, experts
  int64_t top;

  // Rows of a layer's weights, and of what it is fed: its inputs, the bias against ones, zeros that fill up lists.
  int64_t rows(int layer) const { return sizes[layer] + 2; }
  // Weights are [row][padded(output)], layer after layer.
  int64_t layer_weights(int layer) const { return rows(layer) * padded(sizes[layer + 1]); }
  int64_t weights() const { return layer_weights(0) + layer_weights(1) + layer_weights(2); }
  // Rows of kTimes numbers that hold a layer's values: products write whole tiles.
  int64_t room(int layer) const { return padded(sizes[layer]) + kPad; }
  int64_t most_room() const {
    int64_t most = 0;
    for (int layer = 0; layer < 4; ++layer) most = room(layer) > most ? room(layer) : most;
    return most;
  }
};

}  // namespace evkernels
