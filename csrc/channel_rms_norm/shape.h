// Sizes of one norm over channels and how it is shared out; plain numbers, for host and loops alike.
#pragma once

#include <cstdint>

struct ChannelNormShape {
  int64_t batch, channels, pixels;  // of a sample; of channels_last tensors all pixels are one sample
  double eps;
  // Units of work, which set the order of sums: blocks of a sample's pixels, or some whole samples.
  int64_t blocks, samples;

  int64_t units() const { return blocks > 1 ? batch * blocks : (batch + samples - 1) / samples; }
  // The first pixel of a sample's block. Blocks begin at cache lines where the sample does.
  int64_t first_pixel(int64_t block) const { return block == blocks ? pixels : pixels * block / blocks / 16 * 16; }
};
