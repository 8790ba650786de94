// Loops of voxel_grid over the bins of one window, compiled once per instruction set.
//
// Events are taken in blocks, and a block's values are then added one by one. In a time-sorted window nearly all blocks
// lie between the same two bins, whose planes are then fixed. The order of additions to a cell is that of the events,
// whoever adds.
//
// The additions are bound by cache misses: at 640x480, 5 bins and 1e6 evenly spread events they take 4.2 ns per event
// from two planes in the level-2 cache and 2.5 ns where the planes are paired; what is before them takes 1.2 ns and is
// partly hidden behind them by short blocks. Pairing, short blocks of known length and products in place of quotients
// win 1.3 to 1.5 times together. What lost: events first sorted into bands of the image that fit into cache, by 2.1
// times. Prefetching the cells 8 to 32 events ahead or the next block's columns, 32-bit cells, both loads before both
// stores, or planes that are no multiple of a page apart changed nothing measurable.

#include "voxel_grid/block.inl"
#include "voxel_grid/planes.inl"

// All events of the block are in range and between the same two bins.
template <class R>
static void add_between(const Block<R>& block, int64_t count, bool left, bool right, const Planes<R>& planes) {
  if (!left && !right) return;
  const int64_t bin = block.lowest;
  R* const lower = &planes.at(left ? bin : bin + 1, 0);
  if (left && right && planes.is_paired()) {
    typedef R Two __attribute__((vector_size(2 * sizeof(R)), aligned(sizeof(R))));
    for (int64_t k = 0; k < count; ++k) *(Two*)(lower + 2 * block.cell[k]) += (Two){block.left[k], block.right[k]};
  } else if (left && right) {
    R* const upper = &planes.at(bin + 1, 0);
    for (int64_t k = 0; k < count; ++k) {
      const int64_t cell = block.cell[k];
      lower[cell] += block.left[k];
      upper[cell] += block.right[k];
    }
  } else {
    const R* const value = left ? block.left : block.right;
    const int64_t stride = planes.is_paired() ? 2 : 1;
    for (int64_t k = 0; k < count; ++k) lower[stride * block.cell[k]] += value[k];
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

// The first event of [begin, end) whose bin is at least `bin`; t is sorted.
template <class T>
static int64_t lower_bound(const T* t, int64_t begin, int64_t end, int64_t bin, T t0, double span,
                           const VoxelShape& shape) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (lower_bin(position_of(t[middle], t0, span, shape), shape) < bin) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Whether events that come bin by bin are so many that fewer cache misses outweigh the copying of planes: at a third of
// an event per pixel between two bins that takes 1.1 times as long, at 0.8 it is 1.2 times as fast. Windows of 34x34
// miss no caches: paired, 4,100 events take 1.05 times as long.
static bool pays_to_pair(int64_t events, const VoxelShape& shape, Own own) {
  constexpr int64_t kCached = 1 << 14;  // pixels of two planes that are in cache anyway
  const int64_t bins = own.last - own.first, pixels = shape.height * shape.width;
  return bins >= 3 && pixels > kCached && !shape.is_hard && 2 * events >= (bins - 1) * pixels;
}

// Fills the bins [first_bin, last_bin) of the window of events [begin, end). With `sorted` only the events between them
// are read; returns false, with the planes in any state, if a timestamp met on the way is smaller than its predecessor.
template <class T, class R>
static bool fill(const T* t, VoxelColumns columns, PixelMap map, VoxelShape shape, int64_t begin, int64_t end,
                 int64_t first_bin, int64_t last_bin, bool sorted, R* window, int64_t& dropped) {
  const Own own{first_bin, last_bin};
  T t0 = begin < end ? t[begin] : 0, t1 = begin < end ? t[end - 1] : 0;
  if (!sorted) {
    for (int64_t k = begin; k < end; ++k) {
      t0 = t[k] < t0 ? t[k] : t0;
      t1 = t[k] > t1 ? t[k] : t1;
    }
  } else if (t1 < t0) {
    return false;
  }
  const double difference = elapsed(t1, t0);
  const double span = difference > 0 ? difference : 1;
  int64_t event = begin, stop = end;
  if (sorted) {
    if (first_bin > 0) event = lower_bound(t, begin, end, first_bin - 1, t0, span, shape);
    if (last_bin < shape.bins) stop = lower_bound(t, event, end, last_bin, t0, span, shape);
  }
  const bool is_sub_pixel = columns.xy_type != RealType::kNone || map.places;
  // Differences of sorted times that wrap do not ascend.
  const bool is_ascending = sorted && difference >= 0;
  Planes<R> planes(window, shape, own, is_ascending && !is_sub_pixel && pays_to_pair(stop - event, shape, own));
  if (!is_ascending) planes.advance(last_bin);
  Block<R> block;
  while (event < stop) {
    const int64_t count = stop - event < kBlock ? stop - event : kBlock;
    // Each event is compared with its successor; the last one of the window has none.
    const int64_t successors = event + count < end ? count : count - 1;
    if (sorted && !(successors == kBlock ? is_sorted(t + event, kBlock) : is_sorted(t + event, successors)))
      return false;
    const Gaps gaps = read_block(t, columns, map, shape, event, count, t0, span, is_ascending, block);
    planes.advance(block.highest + 1);
    if (gaps.out_of_range > 0) {
      for (int64_t k = 0; k < count; ++k) {
        const int64_t bin = block.bin[k] < 0 ? 0 : block.bin[k] < shape.bins ? block.bin[k] : shape.bins - 1;
        dropped += block.cell[k] == kOutOfRange && owns(own, bin);
      }
    }
    if (is_sub_pixel) {
      add_sub_pixel(block, count, shape, own, window);
    } else if (gaps.any || block.lowest != block.highest) {
      add_anywhere(block, count, shape.is_hard, own, planes);
    } else {
      const int64_t bin = block.lowest;
      add_between(block, count, owns(own, bin), !shape.is_hard && owns(own, bin + 1), planes);
    }
    event += count;
  }
  planes.advance(last_bin);
  return true;
}
