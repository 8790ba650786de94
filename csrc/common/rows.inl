// Walks over the elements of a state in vectors, for the loops of elementwise ops. Included by loops.inl files inside
// each instruction set's namespace; includes nothing itself.
//
// A row is `inner` consecutive elements of the state; tensors with k blocks of channels have rows k times as long, the
// blocks of a row following each other. Contiguous tensors have one row per sample (inner = C*H*W), channels_last
// tensors one per pixel (inner = C), so one loop serves both.

// How a loop body reads and writes: a whole vector, or the first `count` elements of one at the end of a row; more at
// once in common/interleaved.inl. Value<T> is what the body then computes with.
struct WholeVector {
  static constexpr int kVectors = 1;
  template <class T>
  using Value = typename Arithmetic<T>::Type;
  template <class T>
  EVKERNELS_LOOP_BODY typename Arithmetic<T>::Type read(const T* p) const {
    return load(p);
  }
  template <class T>
  EVKERNELS_LOOP_BODY void write(T* p, typename Arithmetic<T>::Type v) const {
    store(p, v);
  }
};
struct PartialVector {
  int64_t count;
  template <class T>
  using Value = typename Arithmetic<T>::Type;
  template <class T>
  EVKERNELS_LOOP_BODY typename Arithmetic<T>::Type read(const T* p) const {
    return load_partial(p, count);
  }
  template <class T>
  EVKERNELS_LOOP_BODY void write(T* p, typename Arithmetic<T>::Type v) const {
    store_partial(p, v, count);
  }
};

// Calls body(access, row, e) for each vector of [begin, end), e counting elements of the state and `row` the row that
// holds them: Wide::kVectors at once, then singly. The range may start and stop inside a row, which lets threads share
// a single sample.
template <int kLanes, class Wide = WholeVector, class Body>
EVKERNELS_INLINE void for_each_vector(int64_t inner, int64_t begin, int64_t end, const Body& body) {
  for (int64_t start = begin; start < end;) {
    const int64_t row = start / inner;
    const int64_t stop = (row + 1) * inner < end ? (row + 1) * inner : end;
    int64_t e = start;
    for (constexpr int k = Wide::kVectors * kLanes; e + k <= stop; e += k) body(Wide{}, row, e);
    if constexpr (Wide::kVectors > 1) {
      for (; e + kLanes <= stop; e += kLanes) body(WholeVector{}, row, e);
    }
    if (e < stop) body(PartialVector{stop - e}, row, e);
    start = stop;
  }
}
