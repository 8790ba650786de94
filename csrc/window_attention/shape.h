// Sizes of one call.
#pragma once

#include <cstdint>

namespace evkernels {

struct WindowShape {
  int64_t batch, height, width;
  int64_t heads, dim;  // channels of a head
  int64_t rows, columns;
  bool grid;

  int64_t channels() const { return heads * dim; }
  int64_t tokens() const { return rows * columns; }
  int64_t down() const { return height / rows; }
  int64_t across() const { return width / columns; }
  int64_t partitions() const { return down() * across(); }
  // The work that threads share: one head in one partition.
  int64_t units() const { return batch * partitions() * heads; }
};

}  // namespace evkernels
