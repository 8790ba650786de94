// Loops of event_histogram over the bins of one window, compiled once per instruction set.
//
// In a time-sorted window a bin is a range of the event index, found by binary search with the formula that bins single
// events, so no event's time is converted. That the window is sorted is verified bin by bin, at 0.4 ns per event a
// fifth of the total; doing it block by block between the increments cost 0.1 ns more. Each bin's two planes are
// cleared right before they are filled, while they fit in the level-2 cache.
// Prefetching the counters gained nothing measurable.

#include "common/event_cells.inl"
#include "event_histogram/math.inl"

template <class C>
EVKERNELS_INLINE void increment(C* __restrict__ counters, const int64_t* __restrict__ cell, int64_t count,
                                bool has_gaps, C cutoff) {
  if (has_gaps) {
    for (int64_t k = 0; k < count; ++k) {
      if (cell[k] >= 0) counters[cell[k]] += counters[cell[k]] < cutoff;
    }
  } else {
    for (int64_t k = 0; k < count; ++k) counters[cell[k]] += counters[cell[k]] < cutoff;
  }
}

template <class C>
EVKERNELS_INLINE void clear_planes(C* window, const HistogramShape& shape, int64_t first_bin, int64_t last_bin) {
  const int64_t plane = shape.height * shape.width;
  __builtin_memset(window + first_bin * plane, 0, (last_bin - first_bin) * plane * sizeof(C));
  __builtin_memset(window + (shape.bins + first_bin) * plane, 0, (last_bin - first_bin) * plane * sizeof(C));
}

// The first event of [begin, end) whose bin is at least `bin`; t is sorted.
template <class T>
EVKERNELS_INLINE int64_t lower_bound(const T* t, int64_t begin, int64_t end, int64_t bin, int64_t t0, float span,
                                     float bins) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (event_bin(wrapping_difference(t[middle], t0), span, bins) < bin) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Fills the bins [first_bin, last_bin) of the window of events [begin, end). Returns false, with the planes in any
// state, if a timestamp met on the way is smaller than its predecessor.
template <class T, class C>
static bool fill_sorted(const T* t, EventColumns events, PixelMap map, HistogramShape shape, int64_t begin, int64_t end,
                        int64_t first_bin, int64_t last_bin, C* window, int64_t& dropped) {
  const int64_t plane = shape.height * shape.width;
  const int64_t on = shape.bins * plane;
  int64_t cell[kBlock];
  const int64_t t0 = begin < end ? t[begin] : 0;
  const int64_t difference = begin < end ? wrapping_difference(t[end - 1], t0) : 0;
  if (difference < 0) return false;
  const float span = (float)(difference > 1 ? difference : 1);
  const float bins = (float)shape.bins;
  int64_t event = first_bin == 0 ? begin : lower_bound(t, begin, end, first_bin, t0, span, bins);
  for (int64_t bin = first_bin; bin < last_bin; ++bin) {
    clear_planes(window, shape, bin, bin + 1);
    const int64_t stop = bin + 1 == shape.bins ? end : lower_bound(t, event, end, bin + 1, t0, span, bins);
    // Each event is compared with its successor; the last one of the window has none.
    if (!is_sorted(t + event, (stop < end ? stop : end - 1) - event)) return false;
    while (event < stop) {
      const int64_t count = stop - event < kBlock ? stop - event : kBlock;
      const Gaps gaps = read_cells(events, map, plane, on, event, count, cell);
      increment(window + bin * plane, cell, count, gaps.any, (C)shape.cutoff);
      dropped += gaps.out_of_range;
      event += count;
    }
  }
  return true;
}

// The same for events in any order: reads all of them twice and counts those of its own bins.
template <class T, class C>
static void fill_unsorted(const T* t, EventColumns events, PixelMap map, HistogramShape shape, int64_t begin,
                          int64_t end, int64_t first_bin, int64_t last_bin, C* window, int64_t& dropped) {
  T t0 = begin < end ? t[begin] : 0, t1 = t0;
  for (int64_t k = begin; k < end; ++k) {
    t0 = t[k] < t0 ? t[k] : t0;
    t1 = t[k] > t1 ? t[k] : t1;
  }
  const int64_t difference = wrapping_difference(t1, t0);
  const float span = (float)(difference > 1 ? difference : 1);
  const float bins = (float)shape.bins;
  const int64_t plane = shape.height * shape.width;
  const int64_t on = shape.bins * plane;
  int64_t cell[kBlock];
  int32_t bin[kBlock];
  clear_planes(window, shape, first_bin, last_bin);
  for (int64_t event = begin; event < end; event += kBlock) {
    const int64_t count = end - event < kBlock ? end - event : kBlock;
    read_cells(events, map, plane, on, event, count, cell);
    for (int64_t k = 0; k < count; ++k) bin[k] = event_bin(wrapping_difference(t[event + k], t0), span, bins);
    bool has_gaps = false;
    for (int64_t k = 0; k < count; ++k) {
      const bool own = bin[k] >= first_bin && bin[k] < last_bin;
      dropped += own && cell[k] == kOutOfRange;
      cell[k] = own && cell[k] >= 0 ? cell[k] + bin[k] * plane : -1;
      has_gaps |= cell[k] < 0;
    }
    increment(window, cell, count, has_gaps, (C)shape.cutoff);
  }
}
