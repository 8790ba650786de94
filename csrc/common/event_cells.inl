// Events to cells of an image, block by block. Part of a loop file, see foreach_isa.h.
//
// Columns are brought to int32, and to cells, in blocks that stay in the level-1 cache: that vectorises for every
// integer type. The types that cameras use, coordinates of 16 bits and polarities of 8, go to cells in one loop. Blocks
// are so short that the processor computes a block's cells while it waits for the counters of the one before: with 512
// events per block a histogram of 1e6 events took 1.6 times as long, with 64 1.05 times. 32-bit cells gained nothing
// measurable, prefetched counters cost 1.2 times.

#include "common/event_columns.inl"

// Without AVX-512 128 events per block take 1.1 times as long in windows of 34x34, whose blocks often cross from one
// bin to the next, and 0.95 to 1.0 times in large ones.
constexpr int64_t kBlock = EVKERNELS_LANES == 16 ? 128 : 64;

// Whether each of `count` elements, no more than kBlock, is followed by one that is not smaller.
template <class T>
EVKERNELS_INLINE bool is_block_sorted(const T* __restrict__ t, int64_t count) {
  return count == kBlock ? is_sorted(t, kBlock) : is_sorted(t, count);
}

// What read_cells gives to events without a cell.
constexpr int64_t kOutOfRange = -1, kLeftOut = -2;

// How many events of a block are out of range, and whether any event has no cell.
struct Gaps {
  int64_t out_of_range;
  bool any;
};

EVKERNELS_INLINE bool is_narrow(const EventColumns& events, int64_t plane) {
  return plane < (int64_t)1 << 31 && (events.x_type == IntType::kInt16 || events.x_type == IntType::kUInt16) &&
         (events.y_type == IntType::kInt16 || events.y_type == IntType::kUInt16) &&
         (events.p_type == IntType::kInt8 || events.p_type == IntType::kUInt8);
}

// How many different values in [0, limit) a column of 16 bits holds when it is read as unsigned.
EVKERNELS_INLINE int32_t unsigned_limit(IntType type, int64_t limit) {
  const int64_t values = type == IntType::kInt16 ? 1 << 15 : 1 << 16;
  return (int32_t)(limit < values ? limit : values);
}

// Cells of columns that are narrow; returns how many events are out of range. 64-bit numbers take twice as many
// instructions: they are made last.
EVKERNELS_INLINE int64_t read_narrow_cells(const EventColumns& events, const PixelMap& map, int64_t on, int64_t first,
                                           int64_t count, int64_t* __restrict__ cell) {
  const uint16_t* __restrict__ const x = (const uint16_t*)events.x + first;
  const uint16_t* __restrict__ const y = (const uint16_t*)events.y + first;
  const uint8_t* __restrict__ const p = (const uint8_t*)events.p + first;
  const int32_t last_column = unsigned_limit(events.x_type, map.width) - 1;
  const int32_t last_row = unsigned_limit(events.y_type, map.height) - 1;
  const int32_t row_size = (int32_t)map.width;
  // -1 is a polarity of signed columns only.
  const int32_t negative = events.p_type == IntType::kInt8;
  int32_t pixel[kBlock];
  int32_t any_outside = 0;
  for (int64_t k = 0; k < count; ++k) {
    const int32_t column = x[k], row = y[k], polarity = (p[k] + negative) & 255;
    const int32_t outside = ((last_column - column) | (last_row - row) | (1 + negative - polarity)) >> 31;
    pixel[k] = outside | (row * row_size + column);
    any_outside |= outside;
  }
  if (!any_outside) {
    for (int64_t k = 0; k < count; ++k) cell[k] = pixel[k] + (p[k] == 1 ? on : 0);
    return 0;
  }
  int64_t outside = 0;
  for (int64_t k = 0; k < count; ++k) {
    cell[k] = pixel[k] < 0 ? kOutOfRange : pixel[k] + (p[k] == 1 ? on : 0);
    outside += pixel[k] < 0;
  }
  return outside;
}

// Cells of the OFF plane, `on` further for ON events. Planes have `plane` cells.
static Gaps read_cells(const EventColumns& events, const PixelMap& map, int64_t plane, int64_t on, int64_t first,
                       int64_t count, int64_t* __restrict__ cell) {
  if (!map.cells && is_narrow(events, map.height * map.width)) {
    // Loops of known length need no remainders.
    const int64_t outside = count == kBlock ? read_narrow_cells(events, map, on, first, kBlock, cell)
                                            : read_narrow_cells(events, map, on, first, count, cell);
    return {outside, outside > 0};
  }
  int32_t x[kBlock], y[kBlock], p[kBlock];
  const auto read_x = [&](auto column)
                          __attribute__((always_inline)) { read_coordinates(column, count, map.width, x); };
  const auto read_y = [&](auto column)
                          __attribute__((always_inline)) { read_coordinates(column, count, map.height, y); };
  const auto read_p = [&](auto column) __attribute__((always_inline)) { read_polarities(column, count, p); };
  with_type(events.x_type, events.x, first, read_x);
  with_type(events.y_type, events.y, first, read_y);
  with_type(events.p_type, events.p, first, read_p);
  // A product of 32-bit numbers is one instruction for a whole vector, one of 64-bit numbers several.
  const int32_t row_size = (int32_t)map.width;
  int32_t outside = 0, left_out = 0;
  if (map.cells == nullptr) {
    for (int64_t k = 0; k < count; ++k) {
      const int32_t invalid = (x[k] | y[k] | p[k]) >> 31;  // 0 or -1
      cell[k] = invalid ? kOutOfRange : (int64_t)y[k] * row_size + x[k] + (-(int64_t)p[k] & on);
      outside -= invalid;
    }
  } else {
    // Three loops, so that the look-up is a gather: 1.7 times the time of an unmapped histogram, one loop 2.5 times.
    int32_t own[kBlock];
    for (int64_t k = 0; k < count; ++k) {
      const int32_t invalid = (x[k] | y[k] | p[k]) >> 31;
      y[k] = ~invalid & (y[k] * row_size + x[k]);
      x[k] = invalid;
      outside -= invalid;
    }
    for (int64_t k = 0; k < count; ++k) own[k] = map.cells[y[k]];
    for (int64_t k = 0; k < count; ++k) {
      const bool is_inside = (uint64_t)(int64_t)own[k] < (uint64_t)plane;
      const int64_t found = is_inside ? own[k] + (-(int64_t)p[k] & on) : kLeftOut;
      cell[k] = x[k] ? kOutOfRange : found;
      left_out += !is_inside;
    }
  }
  return {outside, (outside | left_out) > 0};
}
