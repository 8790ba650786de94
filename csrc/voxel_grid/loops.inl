// Loops of voxel_grid over the bins of one window, compiled once per instruction set.
//
// Events are taken in blocks, and a block's values are then added one by one. In a time-sorted window nearly all blocks
// lie between the same two bins, whose planes are then fixed. Additions to a cell are in the order of the events read.
//
// The additions are bound by cache misses: at 640x480, 5 bins and 1e6 evenly spread events they take 4.2 ns per event
// from two planes in the level-2 cache and 2.5 ns where a pixel's two values are side by side; what is before them
// takes 1.2 ns and is partly hidden behind them by short blocks. Swapped pixels, short blocks of known length and
// products in place of quotients win 1.3 to 1.5 times together. What lost: events first sorted into bands of the image
// that fit into cache, by 2.1 times. Prefetching the cells 8 to 32 events ahead, 32-bit cells, both loads before both
// stores, or planes that are no multiple of a page apart changed nothing measurable. Columns prefetched some blocks
// ahead changed nothing there either, but on a Zen 3 core they take 0.75 of the time of none; a block's cells
// prefetched while its values are computed, or planes cleared by stores that stay in cache, gain nothing there.

#include "voxel_grid/block.inl"
#include "voxel_grid/planes.inl"

// All events of the block are in range and between the same two bins.
template <class R>
static void add_between(const Block<R>& block, int64_t count, Own own, bool is_hard, const Planes<R>& planes) {
  const int64_t bin = block.lowest;
  const bool left = owns(own, bin), right = !is_hard && owns(own, bin + 1);
  if (!left && !right) return;
  R* const lower = planes.window + (left ? bin : bin + 1) * planes.pixels;
  if (planes.is_swapped) {
    typedef R Two __attribute__((vector_size(2 * sizeof(R)), aligned(sizeof(R))));
    for (int64_t k = 0; k < count; ++k)
      *(Two*)(lower + planes.pair(block.cell[k])) += (Two){block.left[k], block.right[k]};
  } else if (left && right) {
    R* const upper = lower + planes.pixels;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t cell = block.cell[k];
      lower[cell] += block.left[k];
      upper[cell] += block.right[k];
    }
  } else {
    const R* const value = left ? block.left : block.right;
    for (int64_t k = 0; k < count; ++k) lower[block.cell[k]] += value[k];
  }
}

template <class R>
static void add_anywhere(const Block<R>& block, int64_t count, bool is_hard, Own own, const Planes<R>& planes) {
  for (int64_t k = 0; k < count; ++k) {
    if (block.cell[k] < 0) continue;
    const int64_t bin = block.bin[k];
    if (owns(own, bin)) planes.at(bin, block.cell[k]) += block.left[k];
    if (!is_hard && owns(own, bin + 1)) planes.at(bin + 1, block.cell[k]) += block.right[k];
  }
}

// Each value is shared between four pixels.
template <class R>
static void add_sub_pixel(const Block<R>& block, int64_t count, const VoxelShape& shape, Own own,
                          R* __restrict__ grid) {
  for (int64_t k = 0; k < count; ++k) {
    if (block.cell[k] <= kLeftOut) continue;
    for (int32_t upper = 0; upper < 2; ++upper) {
      const int64_t bin = block.bin[k] + upper;
      if (!owns(own, bin)) continue;
      const R value = upper ? block.right[k] : block.left[k];
      R* const corner = grid + bin * shape.height * shape.width + block.cell[k];
      const bool has_left = block.column[k] >= 0, has_right = block.column[k] + 1 < shape.width;
      const bool has_top = block.row[k] >= 0, has_bottom = block.row[k] + 1 < shape.height;
      const R left = 1 - block.past_column[k], right = block.past_column[k];
      const R top = value * (1 - block.past_row[k]), bottom = value * block.past_row[k];
      if (has_top && has_left) corner[0] += top * left;
      if (has_top && has_right) corner[1] += top * right;
      if (has_bottom && has_left) corner[shape.width] += bottom * left;
      if (has_bottom && has_right) corner[shape.width + 1] += bottom * right;
    }
  }
}

// A window's times: the first and last of them, and what their difference counts as.
template <class T>
struct Times {
  T first, last;
  double difference, span;
};
template <class T>
EVKERNELS_INLINE Times<T> times_between(T first, T last) {
  const double difference = elapsed(last, first);
  return {first, last, difference, difference > 0 ? difference : 1};
}
template <class T>
EVKERNELS_INLINE Times<T> sorted_times(const T* t, int64_t begin, int64_t end) {
  return times_between(begin < end ? t[begin] : (T)0, begin < end ? t[end - 1] : (T)0);
}

// The first event of [begin, end) whose bin is at least `bin`; t is sorted. Whether it is or not, larger bins give no
// smaller results.
template <class T>
static int64_t lower_bound(const T* t, int64_t begin, int64_t end, int64_t bin, const Times<T>& times,
                           const VoxelShape& shape) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (lower_bin(position_of(t[middle], times.first, times.span, shape), shape) < bin) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Adds the events [event, stop) of a window that ends at `end` to the planes of `own`. With `sorted` it returns false,
// and adds to no other planes, if a timestamp met on the way is smaller than its predecessor.
template <class T, class R>
static bool add_events(const T* t, const VoxelColumns& columns, const PixelMap& map, const VoxelShape& shape,
                       int64_t event, int64_t stop, int64_t end, const Times<T>& times, bool sorted, Own own,
                       const Planes<R>& planes, int64_t& dropped) {
  const bool is_sub_pixel = columns.xy_type != RealType::kNone || map.places;
  // Differences of sorted times that wrap do not ascend.
  const bool is_ascending = sorted && times.difference >= 0;
  Block<R> block;
  for (; event < stop; event += kBlock) {
    const int64_t count = stop - event < kBlock ? stop - event : kBlock;
    prefetch_block<T, R>(columns, event);
    // Each event is compared with its successor; the last one of the window has none.
    const int64_t successors = event + count < end ? count : count - 1;
    if (sorted && !(successors == kBlock ? is_sorted(t + event, kBlock) : is_sorted(t + event, successors)))
      return false;
    const Gaps gaps = read_block(t, columns, map, shape, event, count, times.first, times.span, is_ascending, block);
    if (gaps.out_of_range > 0) {
      for (int64_t k = 0; k < count; ++k) {
        const int64_t bin = block.bin[k] < 0 ? 0 : block.bin[k] < shape.bins ? block.bin[k] : shape.bins - 1;
        dropped += block.cell[k] == kOutOfRange && owns(own, bin);
      }
    }
    const bool is_between = !gaps.any && block.lowest == block.highest;
    if (is_sub_pixel) {
      add_sub_pixel(block, count, shape, own, planes.window);
    } else if (is_between && (!planes.is_swapped || block.lowest == planes.lower)) {
      add_between(block, count, own, shape.is_hard, planes);
    } else {
      add_anywhere(block, count, shape.is_hard, own, planes);
    }
  }
  return true;
}

// Fills the bins [first_bin, last_bin) of the window of events [begin, end), in the order of the events. With `sorted`
// only the events between them are read; returns false, with the planes in any state, if a timestamp met on the way is
// smaller than its predecessor.
template <class T, class R>
static bool fill(const T* t, VoxelColumns columns, PixelMap map, VoxelShape shape, int64_t begin, int64_t end,
                 int64_t first_bin, int64_t last_bin, bool sorted, R* window, int64_t& dropped) {
  const Own own{first_bin, last_bin};
  Times<T> times = sorted_times(t, begin, end);
  int64_t event = begin, stop = end;
  if (!sorted) {
    T first = times.first, last = times.last;
    for (int64_t k = begin; k < end; ++k) {
      first = t[k] < first ? t[k] : first;
      last = t[k] > last ? t[k] : last;
    }
    times = times_between(first, last);
  } else {
    if (times.last < times.first) return false;
    if (first_bin > 0) event = lower_bound(t, begin, end, first_bin - 1, times, shape);
    if (last_bin < shape.bins) stop = lower_bound(t, event, end, last_bin, times, shape);
  }
  clear_planes(window, shape, own);
  const Planes<R> planes{window, shape.height * shape.width, 0, false};
  return add_events(t, columns, map, shape, event, stop, end, times, sorted, own, planes, dropped);
}

// The first event of every interval of the window: starts[k + 1] for that of the events between the bins k and k + 1,
// bins + 2 of them with the end. Returns false if the window is not sorted or its times wrap.
template <class T>
static bool find_intervals(const T* t, VoxelShape shape, int64_t begin, int64_t end, int64_t* starts) {
  const Times<T> times = sorted_times(t, begin, end);
  if (times.last < times.first || !(times.difference >= 0)) return false;
  starts[0] = begin;
  for (int64_t bin = 0; bin < shape.bins; ++bin) starts[bin + 1] = lower_bound(t, begin, end, bin, times, shape);
  starts[shape.bins + 1] = end;
  return true;
}

// Adds the interval of events [event, stop) to those of its two bins that are in `own`, which are cleared first or not.
// Returns false, with these in any state, if a timestamp met on the way is smaller than its predecessor.
template <class T, class R>
static bool fill_interval(const T* t, VoxelColumns columns, PixelMap map, VoxelShape shape, int64_t begin, int64_t end,
                          int64_t event, int64_t stop, int64_t first_bin, int64_t last_bin, bool is_cleared, R* window,
                          int64_t& dropped) {
  const Own own{first_bin, last_bin};
  const int64_t pixels = shape.height * shape.width;
  const bool is_sub_pixel = columns.xy_type != RealType::kNone || map.places;
  // At a third of an event per pixel swapping takes 1.1 times as long, at 0.8 it is 1.2 times as fast.
  const bool is_swapped =
      last_bin - first_bin == 2 && !shape.is_hard && !is_sub_pixel && pixels % 2 == 0 && 2 * (stop - event) >= pixels;
  const Planes<R> planes{window, pixels, first_bin, is_swapped};
  R* const lower = window + first_bin * pixels;
  if (is_cleared) {
    clear_planes(window, shape, own);
  } else if (is_swapped) {
    swap_pixels(lower, lower + pixels, pixels);
  }
  const bool is_sorted =
      add_events(t, columns, map, shape, event, stop, end, sorted_times(t, begin, end), true, own, planes, dropped);
  if (is_swapped) swap_pixels(lower, lower + pixels, pixels);
  return is_sorted;
}
