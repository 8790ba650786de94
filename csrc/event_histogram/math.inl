// The time bin of an event, in float32 and in RVT's order of operations: every backend must round alike. Includes
// nothing: it is compiled inside each instruction set's namespace and in CUDA.

// `since` is t - t0, of any integer type that holds it, and `span` max(t1 - t0, 1), both subtracted in 64-bit integers.
// The bounds hold by themselves unless the timestamps span more than 63 bits.
template <class I>
EVKERNELS_INLINE int32_t event_bin(I since, float span, float bins) {
  const float bin = (float)since / span * bins;
  const float clamped = bin < bins - 1.0f ? bin : bins - 1.0f;
  return clamped > 0.0f ? (int32_t)clamped : 0;
}
