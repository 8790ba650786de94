// Loops of separable_conv2d over tiles of output pixels, compiled once per instruction set.
//
// A tile's depthwise result, activated, stays in a buffer in the cache; the pointwise product reads it from there and
// writes the output once. The product keeps kRows x kVectors accumulators in registers. channels_last: rows are pixels,
// vectors run over output channels, the pointwise weight is packed into panels of that width. NCHW: rows are output
// channels, vectors run over pixels. Every output element is one sum over the channels in ascending order, whatever
// the tile, so that results do not depend on threads.
//
// On vectors of float32 the product, at 0.9 of the multiply-adds' peak, takes from a quarter of the time at 16 to 32
// channels to four fifths at 256; SiLU from 45 % to 10 %, GELU half as much again as SiLU (Emerald Rapids, AVX-512, one
// thread). Where input and output exceed the second-level cache the depthwise part waits for the former: while a tile's
// product runs it asks for the next tile's, which took a third off that part.
//
// channels_last reads the input in place. NCHW first copies a channel's rows under the tile into a zero-padded buffer,
// which rids the vectors of borders, 16-bit types and row ends; that copy costs less than handling them at each tap.

#include "separable_conv2d/products.inl"

#include "separable_conv2d/channels_last.inl"
#include "separable_conv2d/channels_first.inl"

static int64_t separable_conv2d_tiles(const SeparableShape& s, bool channels_last) {
  const int64_t pixels = s.out_height * s.out_width;
  return channels_last ? (s.batch * pixels + kPixelsLast - 1) / kPixelsLast : s.batch * tiling_of(s).tiles;
}

// Elements that each thread needs.
template <class T>
static int64_t separable_conv2d_buffer_size(const SeparableShape& s, bool channels_last) {
  return channels_last ? kPixelsLast * (packed_at<T>(nullptr, s).pitch + outer_pitch<T>(s))
                       : (s.channels + 1 + round_up(s.outputs, kStep)) * kPitch + separable_conv2d_patch_size(s);
}

#include "separable_conv2d/backward.inl"
