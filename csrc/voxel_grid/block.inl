// A block of events, ready to be added. Part of a loop file, see foreach_isa.h.
//
// Cells and the two values to add are computed into level-1 cache, which vectorises for every type. Blocks of sorted
// events nearly all lie between the same two bins, which is seen by their first and last event.

#include "common/event_columns.inl"
#include "voxel_grid/math.inl"

// So few that the processor computes a block while it waits for the additions of the one before. Loops over whole
// blocks are of a length known to the compiler, so that they have no remainders.
constexpr int64_t kBlock = 128;

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
  int64_t cell[kBlock];     // in the plane of bin 0, or one of the two below
  int32_t lowest, highest;  // of the bins
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
EVKERNELS_INLINE void read_signs(const T* __restrict__ column, int64_t count, int32_t* __restrict__ out) {
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

template <class T>
EVKERNELS_INLINE double position_of(T t, T t0, double span, const VoxelShape& shape) {
  const double scale = (double)shape.bins - shape.fewer, limit = (double)shape.bins + 1;
  return position_in_time(elapsed(t, t0), scale, span, shape.shift, limit);
}

// Whether multiply_add fuses.
#if defined(__x86_64__) && EVKERNELS_LANES == 4
constexpr bool kFuses = false;
#else
constexpr bool kFuses = true;
#endif

// since * scale / span, which takes half the time as products: of a quotient that is off by no more than its last bit,
// the fused remainder times the rounded reciprocal makes the rounded quotient (Markstein 1990), as long as nothing
// overflows or underflows, which integers cannot.
template <class T>
EVKERNELS_INLINE void divide_times(const T* __restrict__ t, int64_t count, T t0, double scale, double span,
                                   double* __restrict__ quotient) {
  const bool is_integer = (T)0.5 == 0;
  const double reciprocal = 1 / span;
  for (int64_t k = 0; k < count; ++k) {
    const double dividend = elapsed(t[k], t0) * scale;
    if (kFuses && is_integer) {
      const double rough = dividend * reciprocal;
      const double close = multiply_add(multiply_add(-span, rough, dividend), reciprocal, rough);
      quotient[k] = multiply_add(multiply_add(-span, close, dividend), reciprocal, close);
    } else {
      quotient[k] = dividend / span;
    }
  }
}

// One loop without branches, so that it vectorises: the kind of the ends is fixed, and whether all events are in the
// bin `only`.
template <bool kHard, bool kClamped, bool kSame, class T, class R>
EVKERNELS_INLINE void place_all(const T* __restrict__ t, VoxelShape rule, int64_t count, T t0, double span,
                                int32_t only, const int32_t* __restrict__ sign, Block<R>& block) {
  rule.is_hard = kHard;
  rule.is_clamped = kClamped;
  double quotient[kBlock];
  if (kSame) divide_times(t, count, t0, (double)rule.bins - rule.fewer, span, quotient);
  for (int64_t k = 0; k < count; ++k) {
    // The bounds of position_in_time hold by themselves where the bin is known.
    const double position = kSame ? quotient[k] - rule.shift : position_of(t[k], t0, span, rule);
    const int32_t bin = kSame ? only : lower_bin(position, rule);
    const R past = (R)upper_share(position, bin, rule);
    const R value = (R)value_of_polarity(sign[k], rule);
    block.bin[k] = bin;
    block.left[k] = value * (1 - past);
    block.right[k] = value * past;
  }
}

template <bool kSame, class T, class R>
EVKERNELS_INLINE void place_block(const T* __restrict__ t, const VoxelShape& shape, int64_t count, T t0, double span,
                                  int32_t only, const int32_t* __restrict__ sign, Block<R>& block) {
  if (shape.is_hard) {
    place_all<true, false, kSame>(t, shape, count, t0, span, only, sign, block);
  } else if (shape.is_clamped) {
    place_all<false, true, kSame>(t, shape, count, t0, span, only, sign, block);
  } else {
    place_all<false, false, kSame>(t, shape, count, t0, span, only, sign, block);
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

template <class R>
EVKERNELS_INLINE Gaps find_cells_of(const VoxelColumns& columns, const PixelMap& map, const VoxelShape& shape,
                                    int64_t first, int64_t count, int32_t* __restrict__ sign, Block<R>& block) {
  read_coordinates_of_block(columns, map, shape, first, count, block);
  const auto read_p = [&](auto column) __attribute__((always_inline)) { read_signs(column, count, sign); };
  with_type(columns.events.p_type, columns.events.p, first, read_p);
  // Sub-pixel coordinates are inside from -1 on.
  const int32_t lowest = columns.xy_type == RealType::kNone ? 0 : -1;
  const int64_t off = shape.is_split ? shape.bins * shape.height * shape.width : 0;
  if (map.cells) return map_cells(map, shape, off, count, sign, block);
  if (map.places) return map_places(map, shape, off, count, sign, block);
  // A product of 32-bit numbers is one instruction for a whole vector, one of 64-bit numbers several.
  const int32_t row_size = (int32_t)shape.width;
  int32_t all = 0;
  for (int64_t k = 0; k < count; ++k) all |= (block.column[k] - lowest) | (block.row[k] - lowest) | (1 - sign[k]);
  for (int64_t k = 0; k < count; ++k)
    block.cell[k] = (int64_t)block.row[k] * row_size + block.column[k] + (sign[k] > 0 ? 0 : off);
  if (all >= 0) return {0, false};
  int64_t outside = 0;
  for (int64_t k = 0; k < count; ++k) {
    if (block.column[k] >= lowest && block.row[k] >= lowest && sign[k] <= 1) continue;
    block.cell[k] = kOutOfRange;
    ++outside;
  }
  return {outside, true};
}

// Where the block's events from `first` on go, and their signs. Apart from the times and not inlined, so that it is
// compiled once for all types that these may have: a call per block costs nothing.
template <class R>
static __attribute__((noinline)) Gaps find_cells(const VoxelColumns& columns, const PixelMap& map,
                                                 const VoxelShape& shape, int64_t first, int64_t count,
                                                 int32_t* __restrict__ sign, Block<R>& block) {
  return count == kBlock ? find_cells_of(columns, map, shape, first, kBlock, sign, block)
                         : find_cells_of(columns, map, shape, first, count, sign, block);
}

// Asks for the columns of a block that is read some blocks later.
template <class T, class R>
EVKERNELS_INLINE void prefetch_block(const VoxelColumns& columns, int64_t first) {
  const EventColumns& events = columns.events;
  const int64_t real_size = columns.xy_type == RealType::kFloat32 ? 4 : 8;
  const bool is_real = columns.xy_type != RealType::kNone;
  prefetch_column(events.x, is_real ? real_size : size_of(events.x_type), first, kBlock);
  prefetch_column(events.y, is_real ? real_size : size_of(events.y_type), first, kBlock);
  prefetch_column(events.p, size_of(events.p_type), first, kBlock);
  prefetch_column(events.t, sizeof(T), first, kBlock);
  if (columns.weight) prefetch_column(columns.weight, sizeof(R), first, kBlock);
}

// Fills the block from event `first`. If its times are `ascending`, so are its bins.
template <class T, class R>
static Gaps read_block(const T* __restrict__ t, const VoxelColumns& columns, const PixelMap& map,
                       const VoxelShape& shape, int64_t first, int64_t count, T t0, double span, bool ascending,
                       Block<R>& block) {
  int32_t sign[kBlock];
  const Gaps gaps = find_cells(columns, map, shape, first, count, sign, block);
  block.lowest = lower_bin(position_of(t[first], t0, span, shape), shape);
  block.highest = lower_bin(position_of(t[first + count - 1], t0, span, shape), shape);
  if (count == kBlock && ascending && !gaps.any && block.lowest == block.highest) {
    place_block<true>(t + first, shape, kBlock, t0, span, block.lowest, sign, block);
  } else {
    place_block<false>(t + first, shape, count, t0, span, 0, sign, block);
    for (int64_t k = 0; k < count; ++k) {
      block.lowest = block.bin[k] < block.lowest ? block.bin[k] : block.lowest;
      block.highest = block.bin[k] > block.highest ? block.bin[k] : block.highest;
    }
  }
  const R* __restrict__ const weight = (const R*)columns.weight;
  if (weight != nullptr) {
    for (int64_t k = 0; k < count; ++k) {
      block.left[k] *= weight[first + k];
      block.right[k] *= weight[first + k];
    }
  }
  return gaps;
}
