// Reading columns of any integer type in blocks, for the loops of the event representations: brought to int32 in
// level-1 cache they vectorise for every type. Part of a loop file, see foreach_isa.h: includes nothing.

template <class T>
struct Unsigned {
  using Type = uint32_t;
};
template <>
struct Unsigned<int64_t> {
  using Type = uint64_t;
};
template <>
struct Unsigned<uint64_t> {
  using Type = uint64_t;
};

// Calls f(typed pointer to element `first` of the column).
template <class F>
EVKERNELS_INLINE void with_type(IntType type, const void* column, int64_t first, const F& f) {
  switch (type) {
    case IntType::kInt8:
      return f((const int8_t*)column + first);
    case IntType::kUInt8:
      return f((const uint8_t*)column + first);
    case IntType::kInt16:
      return f((const int16_t*)column + first);
    case IntType::kUInt16:
      return f((const uint16_t*)column + first);
    case IntType::kInt32:
      return f((const int32_t*)column + first);
    case IntType::kUInt32:
      return f((const uint32_t*)column + first);
    case IntType::kInt64:
      return f((const int64_t*)column + first);
    case IntType::kUInt64:
      return f((const uint64_t*)column + first);
  }
}

// Coordinates in [0, limit) as they are, all others as -1.
template <class T>
EVKERNELS_INLINE void read_coordinates(const T* __restrict__ column, int64_t count, int64_t limit,
                                       int32_t* __restrict__ out) {
  using U = typename Unsigned<T>::Type;
  for (int64_t k = 0; k < count; ++k) out[k] = (U)column[k] < (U)limit ? (int32_t)column[k] : -1;
}

// 1 for ON, 0 for OFF (0 or -1), -1 for anything else.
template <class T>
static void read_polarities(const T* __restrict__ column, int64_t count, int32_t* __restrict__ out) {
  using U = typename Unsigned<T>::Type;
  for (int64_t k = 0; k < count; ++k) out[k] = (U)((U)column[k] + 1) <= 2 ? (int32_t)(column[k] == 1) : -1;
}

// Whether each of `count` elements is followed by one that is not smaller: reads count + 1 elements. NaN is followed by
// none.
template <class T>
EVKERNELS_INLINE bool is_sorted(const T* __restrict__ t, int64_t count) {
  int64_t descents = 0;
  for (int64_t k = 0; k < count; ++k) descents |= !(t[k + 1] >= t[k]);
  return !descents;
}

// a - b that wraps instead of overflowing.
EVKERNELS_INLINE int64_t wrapping_difference(int64_t a, int64_t b) { return (int64_t)((uint64_t)a - (uint64_t)b); }
