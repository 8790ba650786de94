// Loops of voxel_grid over the bins of one window, compiled once per instruction set.
//
// Events are taken in blocks: cells, bins and the two values to add are computed into level-1 cache, which vectorises
// for every type, and then added one by one. In a time-sorted window nearly all blocks lie between the same two bins,
// whose planes are then fixed. The order of additions to a cell is that of the events, whoever adds.
//
// The additions are bound by memory: at 640x480, 5 bins and 1e6 evenly spread events they take four fifths of 2.3 ns
// per event. What lost there: both values of a pixel side by side in a buffer that is merged into the grid after each
// bin, by 1.2 times (2.1 times at 1e5 events; it won 1.2 times at 1e7); events first sorted into bands of the image
// that fit into cache, by 2.1 times. Prefetching the cells 8 to 32 events ahead, 32-bit cells, both loads before both
// stores, or blocks of 64 to 256 events with loops of known length changed nothing measurable. Reading the next block's
// times into cache before this block's additions won 1.2 times.

#include "common/event_columns.inl"
#include "voxel_grid/math.inl"

constexpr int64_t kBlock = 512;

// Cells of events that have none. A sub-pixel cell left of or above the image is negative too, but not as far.
constexpr int64_t kOutOfRange = INT64_MIN, kLeftOut = INT64_MIN + 1;

// How many events of a block are out of range, and whether any event has no cell.
struct Gaps {
  int64_t out_of_range;
  bool any;
};

// One block of events, ready to be added.
template <class R>
struct Block {
  int64_t cell[kBlock];  // in the plane of bin 0, or one of the two below
  int32_t bin[kBlock];
  R left[kBlock];   // added in the plane of `bin`
  R right[kBlock];  // added in the next plane
  int32_t column[kBlock], row[kBlock];
  R past_column[kBlock], past_row[kBlock];  // sub-pixel: the share of the next column and row
};

EVKERNELS_INLINE double elapsed(int64_t t, int64_t t0) { return (double)wrapping_difference(t, t0); }
EVKERNELS_INLINE double elapsed(int32_t t, int32_t t0) { return (double)wrapping_difference(t, t0); }
EVKERNELS_INLINE double elapsed(double t, double t0) { return t - t0; }
EVKERNELS_INLINE double elapsed(float t, float t0) { return (double)t - (double)t0; }

// -1, 0 and 1 as they are, all others as 2.
template <class T>
static void read_signs(const T* __restrict__ column, int64_t count, int32_t* __restrict__ out) {
  using U = typename Unsigned<T>::Type;
  for (int64_t k = 0; k < count; ++k) {
    const U above = (U)column[k] + 1;
    out[k] = above <= 2 ? (int32_t)above - 1 : 2;
  }
}

// The index below each coordinate and the share of the index above; -2 for those that touch no index in [0, limit).
template <class T, class R>
static void read_fractions(const T* __restrict__ column, int64_t count, int64_t limit, int32_t* __restrict__ out,
                           R* __restrict__ past) {
  for (int64_t k = 0; k < count; ++k) {
    const bool inside = column[k] > (T)-1 && column[k] < (T)limit;
    const T coordinate = inside ? column[k] : (T)-2;
    const int32_t towards_zero = (int32_t)coordinate;
    out[k] = towards_zero - ((T)towards_zero > coordinate ? 1 : 0);
    past[k] = (R)(coordinate - (T)out[k]);
  }
}

template <class R>
EVKERNELS_INLINE void read_coordinates_of_block(const VoxelColumns& columns, const PixelMap& map,
                                                const VoxelShape& shape, int64_t first, int64_t count,
                                                Block<R>& block) {
  const EventColumns& events = columns.events;
  if (columns.xy_type == RealType::kFloat32) {
    read_fractions((const float*)events.x + first, count, shape.width, block.column, block.past_column);
    read_fractions((const float*)events.y + first, count, shape.height, block.row, block.past_row);
  } else if (columns.xy_type == RealType::kFloat64) {
    read_fractions((const double*)events.x + first, count, shape.width, block.column, block.past_column);
    read_fractions((const double*)events.y + first, count, shape.height, block.row, block.past_row);
  } else {
    const auto read_x = [&](auto column) __attribute__((always_inline)) {
      read_coordinates(column, count, map.width, block.column);
    };
    const auto read_y = [&](auto column)
                            __attribute__((always_inline)) { read_coordinates(column, count, map.height, block.row); };
    with_type(events.x_type, events.x, first, read_x);
    with_type(events.y_type, events.y, first, read_y);
  }
}

// One loop without branches, so that it vectorises: the kind of the ends is fixed.
template <bool kHard, bool kClamped, class T, class R>
EVKERNELS_INLINE void place_all(const T* __restrict__ t, VoxelShape rule, int64_t count, T t0, double span,
                                const int32_t* __restrict__ sign, Block<R>& block) {
  rule.is_hard = kHard;
  rule.is_clamped = kClamped;
  const double scale = (double)rule.bins - rule.fewer, limit = (double)rule.bins + 1;
  for (int64_t k = 0; k < count; ++k) {
    const double position = position_in_time(elapsed(t[k], t0), scale, span, rule.shift, limit);
    const int32_t bin = lower_bin(position, rule);
    const R past = (R)upper_share(position, bin, rule);
    const R value = (R)value_of_polarity(sign[k], rule);
    block.bin[k] = bin;
    block.left[k] = value * (1 - past);
    block.right[k] = value * past;
  }
}

template <class T, class R>
static void place_block(const T* __restrict__ t, const VoxelShape& shape, int64_t count, T t0, double span,
                        const int32_t* __restrict__ sign, Block<R>& block) {
  if (shape.is_hard) {
    place_all<true, false>(t, shape, count, t0, span, sign, block);
  } else if (shape.is_clamped) {
    place_all<false, true>(t, shape, count, t0, span, sign, block);
  } else {
    place_all<false, false>(t, shape, count, t0, span, sign, block);
  }
}

// The pixels of the sensor that events come from, 0 for those out of range; returns how many these are.
template <class R>
static int64_t pixels_of_block(const PixelMap& map, int64_t count, const int32_t* __restrict__ sign,
                               const Block<R>& block, int32_t* __restrict__ pixel, int32_t* __restrict__ invalid) {
  const int32_t row_size = (int32_t)map.width;
  int32_t outside = 0;
  for (int64_t k = 0; k < count; ++k) {
    invalid[k] = (block.column[k] | block.row[k] | (1 - sign[k])) >> 31;  // 0 or -1
    pixel[k] = ~invalid[k] & (block.row[k] * row_size + block.column[k]);
    outside -= invalid[k];
  }
  return outside;
}

// Cells of events whose pixels a map takes to cells, or to places between them.
template <class R>
static Gaps map_cells(const PixelMap& map, const VoxelShape& shape, int64_t off, int64_t count,
                      const int32_t* __restrict__ sign, Block<R>& block) {
  int32_t pixel[kBlock], invalid[kBlock], own[kBlock];
  const int64_t outside = pixels_of_block(map, count, sign, block, pixel, invalid);
  const uint64_t plane = shape.height * shape.width;
  int32_t left_out = 0;
  for (int64_t k = 0; k < count; ++k) own[k] = map.cells[pixel[k]];
  for (int64_t k = 0; k < count; ++k) {
    const bool is_inside = (uint64_t)(int64_t)own[k] < plane;
    const int64_t found = is_inside ? own[k] + (sign[k] > 0 ? 0 : off) : kLeftOut;
    block.cell[k] = invalid[k] ? kOutOfRange : found;
    left_out += !is_inside;
  }
  return {outside, (outside | left_out) > 0};
}
template <class R>
static Gaps map_places(const PixelMap& map, const VoxelShape& shape, int64_t off, int64_t count,
                       const int32_t* __restrict__ sign, Block<R>& block) {
  int32_t pixel[kBlock], invalid[kBlock];
  float x[kBlock], y[kBlock];
  const int64_t outside = pixels_of_block(map, count, sign, block, pixel, invalid);
  for (int64_t k = 0; k < count; ++k) x[k] = map.places[2 * (int64_t)pixel[k]];
  for (int64_t k = 0; k < count; ++k) y[k] = map.places[2 * (int64_t)pixel[k] + 1];
  read_fractions(x, count, shape.width, block.column, block.past_column);
  read_fractions(y, count, shape.height, block.row, block.past_row);
  int32_t left_out = 0;
  for (int64_t k = 0; k < count; ++k) {
    const bool is_inside = (block.column[k] >= -1) & (block.row[k] >= -1);
    const int64_t cell = block.row[k] * shape.width + block.column[k] + (sign[k] > 0 ? 0 : off);
    block.cell[k] = invalid[k] ? kOutOfRange : is_inside ? cell : kLeftOut;
    left_out += !is_inside;
  }
  return {outside, (outside | left_out) > 0};
}

// Where the block's events from `first` on go, and their signs. Apart from the times and not inlined, so that it is
// compiled once for all types that these may have: a call per block costs nothing.
template <class R>
static __attribute__((noinline)) Gaps find_cells(const VoxelColumns& columns, const PixelMap& map,
                                                 const VoxelShape& shape, int64_t first, int64_t count,
                                                 int32_t* __restrict__ sign, Block<R>& block) {
  read_coordinates_of_block(columns, map, shape, first, count, block);
  const auto read_p = [&](auto column) __attribute__((always_inline)) { read_signs(column, count, sign); };
  with_type(columns.events.p_type, columns.events.p, first, read_p);
  // Sub-pixel coordinates are inside from -1 on.
  const int32_t lowest = columns.xy_type == RealType::kNone ? 0 : -1;
  const int64_t off = shape.is_split ? shape.bins * shape.height * shape.width : 0;
  if (map.cells) return map_cells(map, shape, off, count, sign, block);
  if (map.places) return map_places(map, shape, off, count, sign, block);
  int32_t outside = 0;
  for (int64_t k = 0; k < count; ++k) {
    const bool invalid = (block.column[k] < lowest) | (block.row[k] < lowest) | (sign[k] > 1);
    const int64_t cell = block.row[k] * shape.width + block.column[k] + (sign[k] > 0 ? 0 : off);
    block.cell[k] = invalid ? kOutOfRange : cell;
    outside += invalid;
  }
  return {outside, outside > 0};
}

// Fills the block from event `first`.
template <class T, class R>
static Gaps read_block(const T* __restrict__ t, const VoxelColumns& columns, const PixelMap& map,
                       const VoxelShape& shape, int64_t first, int64_t count, T t0, double span, Block<R>& block) {
  int32_t sign[kBlock];
  const Gaps gaps = find_cells(columns, map, shape, first, count, sign, block);
  place_block(t + first, shape, count, t0, span, sign, block);
  const R* __restrict__ const weight = (const R*)columns.weight;
  if (weight != nullptr) {
    for (int64_t k = 0; k < count; ++k) {
      block.left[k] *= weight[first + k];
      block.right[k] *= weight[first + k];
    }
  }
  return gaps;
}

// The bins [first, last) are this caller's to write.
struct Own {
  int64_t first, last;
};
EVKERNELS_INLINE bool owns(Own own, int64_t bin) { return bin >= own.first && bin < own.last; }

template <class R>
EVKERNELS_INLINE void add(R* __restrict__ plane, const int64_t* __restrict__ cell, const R* __restrict__ value,
                          int64_t count) {
  for (int64_t k = 0; k < count; ++k) plane[cell[k]] += value[k];
}

// All events of the block are in range and between the same two bins.
template <class R>
static void add_between(const Block<R>& block, int64_t count, bool left, bool right, int64_t plane,
                        R* __restrict__ grid) {
  R* const lower = grid + block.bin[0] * plane;
  R* const upper = lower + plane;
  if (left && right) {
    for (int64_t k = 0; k < count; ++k) {
      const int64_t cell = block.cell[k];
      lower[cell] += block.left[k];
      upper[cell] += block.right[k];
    }
  } else if (left) {
    add(lower, block.cell, block.left, count);
  } else if (right) {
    add(upper, block.cell, block.right, count);
  }
}

template <class R>
static void add_anywhere(const Block<R>& block, int64_t count, bool is_hard, Own own, int64_t plane,
                         R* __restrict__ grid) {
  for (int64_t k = 0; k < count; ++k) {
    if (block.cell[k] < 0) continue;
    const int64_t bin = block.bin[k];
    if (owns(own, bin)) grid[bin * plane + block.cell[k]] += block.left[k];
    if (!is_hard && owns(own, bin + 1)) grid[(bin + 1) * plane + block.cell[k]] += block.right[k];
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
    const double position = position_in_time(elapsed(t[middle], t0), (double)shape.bins - shape.fewer, span,
                                             shape.shift, (double)shape.bins + 1);
    if (lower_bin(position, shape) < bin) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

template <class R>
EVKERNELS_INLINE void clear_planes(R* window, const VoxelShape& shape, int64_t first_bin, int64_t last_bin) {
  const int64_t plane = shape.height * shape.width;
  for (int64_t half = 0; half < (shape.is_split ? 2 : 1); ++half)
    __builtin_memset(window + (half * shape.bins + first_bin) * plane, 0, (last_bin - first_bin) * plane * sizeof(R));
}

// Brings the times of the next block into cache while this block's additions wait for theirs.
template <class T>
EVKERNELS_INLINE void prefetch_times(const T* t, const T* stop) {
  const int64_t per_line = 64 / sizeof(T);
  const int64_t count = stop - t < kBlock ? stop - t : kBlock;
  for (int64_t k = 0; k < count; k += per_line) __builtin_prefetch(t + k);
}

// Fills the bins [first_bin, last_bin) of the window of events [begin, end). With `sorted` only the events between them
// are read; returns false, with the planes in any state, if a timestamp met on the way is smaller than its predecessor.
template <class T, class R>
static bool fill(const T* t, VoxelColumns columns, PixelMap map, VoxelShape shape, int64_t begin, int64_t end,
                 int64_t first_bin, int64_t last_bin, bool sorted, R* window, int64_t& dropped) {
  const Own own{first_bin, last_bin};
  const int64_t plane = shape.height * shape.width;
  Block<R> block;
  clear_planes(window, shape, first_bin, last_bin);
  if (begin == end) return true;
  T t0 = t[begin], t1 = t[end - 1];
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
  while (event < stop) {
    const int64_t count = stop - event < kBlock ? stop - event : kBlock;
    // Each event is compared with its successor; the last one of the window has none.
    if (sorted && !is_sorted(t + event, event + count < end ? count : count - 1)) return false;
    const Gaps gaps = read_block(t, columns, map, shape, event, count, t0, span, block);
    prefetch_times(t + event + count, t + stop);
    int32_t different = 0;
    for (int64_t k = 0; k < count; ++k) different |= block.bin[k] ^ block.bin[0];
    if (gaps.out_of_range > 0) {
      for (int64_t k = 0; k < count; ++k) {
        const int64_t bin = block.bin[k] < 0 ? 0 : block.bin[k] < shape.bins ? block.bin[k] : shape.bins - 1;
        dropped += block.cell[k] == kOutOfRange && owns(own, bin);
      }
    }
    if (columns.xy_type != RealType::kNone || map.places) {
      add_sub_pixel(block, count, shape, own, window);
    } else if (gaps.any || different) {
      add_anywhere(block, count, shape.is_hard, own, plane, window);
    } else {
      add_between(block, count, owns(own, block.bin[0]), !shape.is_hard && owns(own, block.bin[0] + 1), plane, window);
    }
    event += count;
  }
  return true;
}
