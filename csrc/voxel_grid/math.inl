// An event's place in time, in float64 and in one order of operations: every backend must round alike. Includes
// nothing: it is compiled inside each instruction set's namespace and in CUDA.

// The lower of the two bins and the share of the upper one. A bin outside [0, bins) takes nothing; NaN gives -2. The
// position is a quotient, so that no compiler can fuse the subtraction that follows it with a product.
template <class R>
EVKERNELS_INLINE void place_in_time(double since, double span, const VoxelShape& shape, int32_t& bin, R& past) {
  const double last = (double)(shape.bins - 1);
  const double exact = since * ((double)shape.bins - shape.fewer) / span - shape.shift;
  const double above = exact > -2.0 ? exact : -2.0;
  const double position = above < last + 2.0 ? above : last + 2.0;
  // The floor, which the baseline instruction set has no instruction for.
  const int32_t towards_zero = (int32_t)position;
  int32_t below = towards_zero - ((double)towards_zero > position ? 1 : 0);
  if (shape.is_hard) {
    bin = below < (int32_t)last ? below : (int32_t)last;
    past = 0;
  } else if (shape.is_clamped) {
    below = below > 0 ? below : 0;
    below = below < (int32_t)last ? below : (int32_t)last;
    const double distance = position - (double)below;
    bin = below;
    past = below == (int32_t)last ? (R)0 : (R)(distance < 0 ? -distance : distance);
  } else {
    bin = below;
    past = (R)(position - (double)below);
  }
}

// What an event of polarity -1, 0 or 1 adds in all.
EVKERNELS_INLINE int32_t value_of_polarity(int32_t p, const VoxelShape& shape) {
  if (shape.is_split) return 1;
  return p == 0 ? shape.zero : p;
}
