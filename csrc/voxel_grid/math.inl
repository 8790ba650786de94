// An event's place in time, in float64 and in one order of operations: every backend must round alike. Includes
// nothing: it is compiled inside each instruction set's namespace and in CUDA.

// Counted in bins, within [-2, bins + 1]: bins outside [0, bins) take nothing. NaN gives -2. The result is a quotient
// or a difference from one, so that no compiler can fuse the subtraction that follows it with a product.
EVKERNELS_INLINE double position_in_time(double since, double scale, double span, double shift, double limit) {
  const double exact = since * scale / span - shift;
  const double above = exact > -2.0 ? exact : -2.0;
  return above < limit ? above : limit;
}

// The baseline instruction set has no instruction for it.
EVKERNELS_INLINE int32_t floor_of_position(double position) {
  const int32_t towards_zero = (int32_t)position;
  return towards_zero - ((double)towards_zero > position ? 1 : 0);
}

EVKERNELS_INLINE int32_t clamp_bin(int32_t bin, int32_t low, int32_t high) {
  const int32_t above = bin > low ? bin : low;
  return above < high ? above : high;
}

// The lower of the two bins of a position; the only one if the bins are hard.
EVKERNELS_INLINE int32_t lower_bin(double position, const VoxelShape& shape) {
  const int32_t below = floor_of_position(position);
  const int32_t last = (int32_t)shape.bins - 1;
  if (shape.is_clamped) return clamp_bin(below, 0, last);
  return shape.is_hard && below > last ? last : below;
}

// The share of the bin after `bin`.
EVKERNELS_INLINE double upper_share(double position, int32_t bin, const VoxelShape& shape) {
  if (shape.is_hard) return 0;
  const double past = position - (double)bin;
  if (!shape.is_clamped) return past;
  return bin == (int32_t)shape.bins - 1 ? 0 : past < 0 ? -past : past;
}

// What an event of polarity -1, 0 or 1 adds in all.
EVKERNELS_INLINE int32_t value_of_polarity(int32_t p, const VoxelShape& shape) {
  if (shape.is_split) return 1;
  return p == 0 ? shape.zero : p;
}
