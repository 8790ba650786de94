// Loops of event_histogram over the bins of one window, compiled once per instruction set.
//
// In a time-sorted window a block's events lie in one bin if its last event is still in the bin of the event before the
// block: no other time of the block is converted then. That the window is sorted is verified block by block, while the
// counters of the block before are waited for; with one bin the order does not matter. Planes are cleared right before
// they are filled, while they fit in the level-2 cache; clearing between the blocks gained nothing.
//
// Floors: a sorted check, cells and counters take 1.4 ns per event in the level-1 cache; a batch of 256 windows of
// 34x34, 4,100 events each, takes 1.65 with its clearing. Clearing 10 bins of 640x480 takes 0.35 ms: a call without
// events is 9 times as fast as plain PyTorch's best with 1e5 events, which one with all of them beats by 5 to 7 times.

#include "common/event_cells.inl"
#include "common/event_rows.inl"
#include "event_histogram/math.inl"

template <class C>
EVKERNELS_INLINE void increment(C* __restrict__ counters, const int64_t* __restrict__ cell, int64_t count,
                                bool has_gaps, C cutoff) {
  if (has_gaps) {
    for (int64_t k = 0; k < count; ++k) {
      if (cell[k] >= 0) counters[cell[k]] += counters[cell[k]] < cutoff;
    }
  } else if (count == kBlock) {
    // A loop of known length: its addresses take no instructions of their own.
#pragma GCC unroll 16
    for (int64_t k = 0; k < kBlock; ++k) counters[cell[k]] += counters[cell[k]] < cutoff;
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
static int64_t lower_bound(const T* t, int64_t begin, int64_t end, int64_t bin, int64_t t0, float span, float bins) {
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

// Moves the cells of a block to the planes of their bins. I holds each event's time since t0: only AVX-512 converts 64
// bits to float32 in vectors.
template <class I, class T>
EVKERNELS_INLINE void add_bins(const T* __restrict__ t, int64_t count, int64_t t0, float span, float bins,
                               int64_t plane, int64_t* __restrict__ cell) {
  int32_t bin[kBlock];
  for (int64_t k = 0; k < count; ++k) bin[k] = event_bin((I)wrapping_difference(t[k], t0), span, bins);
  for (int64_t k = 0; k < count; ++k) cell[k] += cell[k] < 0 ? 0 : bin[k] * plane;
}

// Planes are cleared together up to so many bytes.
constexpr int64_t kTogether = 1 << 17;

// Clears the planes of the bins up to `bin`, where `cleared` is the first one that is not; returns the next such bin.
// Small planes are cleared together: one by one each would be waited for.
template <class C>
EVKERNELS_INLINE int64_t clear_up_to(int64_t bin, int64_t cleared, int64_t last_bin, const HistogramShape& shape,
                                     C* window) {
  const int64_t together = 1 + kTogether / (2 * shape.height * shape.width * (int64_t)sizeof(C));
  while (cleared <= bin) {
    const int64_t next = last_bin - cleared < together ? last_bin : cleared + together;
    clear_planes(window, shape, cleared, next);
    cleared = next;
  }
  return cleared;
}

// Brings one window's planes into cache, some of them per block of the window before: clearing small ones would wait
// for memory, and their first events for that. A batch of small windows takes 1.2 times as long without.
class NextWindow {
 public:
  // `planes` is null where no window follows; the window before has `events`.
  NextWindow(const void* planes, int64_t bytes, int64_t events)
      : place_((const char*)planes),
        lines_(planes && bytes <= kTogether ? bytes / 64 / (events / kBlock + 1) + 1 : 0) {}

  void prefetch_some() {
    for (int64_t k = 0; k < lines_; ++k) __builtin_prefetch(place_ + 64 * k, 1);
    place_ += 64 * lines_;
  }

 private:
  const char* place_;
  int64_t lines_;  // per block
};

// Fills the bins [first_bin, last_bin) of the window of events [begin, end). Returns false, with the planes in any
// state, if a timestamp met on the way is smaller than its predecessor. `next` is the window to be filled afterwards,
// or null.
template <class T, class C>
static bool fill_sorted(const T* t, EventColumns events, PixelMap map, HistogramShape shape, int64_t begin, int64_t end,
                        int64_t first_bin, int64_t last_bin, C* window, const C* next, int64_t& dropped) {
  const int64_t plane = shape.height * shape.width;
  const bool ordered = shape.bins > 1;
  const int64_t t0 = begin < end ? t[begin] : 0;
  const int64_t difference = begin < end ? wrapping_difference(t[end - 1], t0) : 0;
  if (ordered && difference < 0) return false;
  const float span = (float)(difference > 1 ? difference : 1);
  const float bins = (float)shape.bins;
  // Those who share a window search alike, so that each of its events is looked at whether it is sorted or not.
  int64_t event = first_bin == 0 ? begin : lower_bound(t, begin, end, first_bin, t0, span, bins);
  const int64_t last = last_bin == shape.bins ? end : lower_bound(t, begin, end, last_bin, t0, span, bins);
  int64_t cell[kBlock];
  int64_t bin = first_bin, cleared = first_bin;
  const C cutoff = (C)shape.cutoff;
  // Kept here: other threads' sums are next to `dropped`.
  int64_t outside = 0;
  NextWindow next_window(next, 2 * shape.bins * plane * (int64_t)sizeof(C), end - begin);
  while (event < last) {
    const int64_t count = last - event < kBlock ? last - event : kBlock;
    prefetch_columns(events, ordered, event, kBlock);
    // Each event is compared with its successor; the last one of the window has none.
    if (ordered && !is_block_sorted(t + event, event + count < end ? count : count - 1)) return false;
    const Gaps gaps = read_cells(events, map, plane, shape.bins * plane, event, count, cell);
    outside += gaps.out_of_range;
    next_window.prefetch_some();
    const int64_t bin_before = bin;
    // With one bin no time is looked at.
    bin = ordered ? event_bin(wrapping_difference(t[event + count - 1], t0), span, bins) : 0;
    if (bin >= last_bin) return false;
    cleared = clear_up_to(bin, cleared, last_bin, shape, window);
    if (bin != bin_before) {
      if (difference <= INT32_MAX) {
        add_bins<int32_t>(t + event, count, t0, span, bins, plane, cell);
      } else {
        add_bins<int64_t>(t + event, count, t0, span, bins, plane, cell);
      }
    }
    increment(window + (bin == bin_before ? bin * plane : 0), cell, count, gaps.any, cutoff);
    event += count;
  }
  clear_up_to(last_bin - 1, cleared, last_bin, shape, window);
  dropped += outside;
  return true;
}

// Counts the events [begin, end) of the rows [first_row, last_row) of a window of one bin, which are cleared first.
// Returns how many are dropped: who has the first row counts those outside all rows.
template <class C>
static int64_t fill_rows(EventColumns events, PixelMap map, HistogramShape shape, int64_t begin, int64_t end,
                         int64_t first_row, int64_t last_row, C* window) {
  const int64_t plane = shape.height * shape.width, rows = last_row - first_row;
  for (int64_t k = 0; k < 2; ++k)
    __builtin_memset(window + k * plane + first_row * shape.width, 0, rows * shape.width * sizeof(C));
  RowEvents<int64_t> own;
  int64_t dropped = 0;
  int64_t cell[kBlock];
  const auto count_own = [&](int64_t first, int64_t count) {
    const Gaps gaps = read_cells(own.columns(events), map, plane, plane, first, count, cell);
    dropped += gaps.out_of_range;
    increment(window, cell, count, gaps.any, (C)shape.cutoff);
  };
  for (int64_t event = begin; event < end; event += kRowBlock) {
    const int64_t count = end - event < kRowBlock ? end - event : kRowBlock;
    add_of_rows(events, (const int64_t*)nullptr, first_row, rows, event, count, own);
    if (first_row == 0) dropped += count_outside_rows(events, shape.height, event, count);
    if (own.count < kRowRun) continue;
    for (int64_t k = 0; k < kRowRun; k += kBlock) count_own(k, kBlock);
    own.remove(kRowRun);
  }
  for (int64_t k = 0; k < own.count; k += kBlock) count_own(k, own.count - k < kBlock ? own.count - k : kBlock);
  return dropped;
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
