// The tile kernel of event_histogram: one block counts the events of one window, bin and strip of rows in shared
// memory. Every strip of a bin looks at the rows of all its events, and each event found costs one round of a warp of
// which a third of the lanes take part, so that on paper integer instructions bound it: 1.9 times the time of the bytes
// on a VGA recording of 293,355 events, 1.5 at 720p (sm_80). Its atomics take 1.5 to 3.2 times as many passes over
// shared memory as words without conflicts would, because the events choose them.
#pragma once

#include "event_histogram/columns.h"
#include "event_histogram/order.cuh"

namespace evkernels {

constexpr int kTileThreads = 512;
#if defined(EVKERNELS_EMULATE)
// So small that the images of the tests have several strips, and some rows that do not fit.
constexpr int64_t kLargestTile = 1 << 10;
#else
constexpr int64_t kLargestTile = 79 << 10;  // bytes, so that two blocks fit into a multiprocessor
#endif

struct HistogramTile {
  int rows;      // of a strip
  int64_t span;  // cells of one polarity in shared memory, whole 16-byte words; 0 if not even a row fits
};

template <int kBits, class Cell>
__device__ __forceinline__ void increment_saturating(uint32_t* words, Cell cell, uint32_t cutoff) {
  constexpr int kCounters = 32 / kBits;  // in a word
  constexpr uint32_t kMask = 0xffffffffu >> (32 - kBits);
  uint32_t* const word = words + cell / kCounters;
  const unsigned shift = kBits * static_cast<unsigned>(cell % kCounters);
  // Counters only grow, so a stale value costs one more round and nothing else.
  uint32_t seen = *static_cast<volatile uint32_t*>(word);
  while ((seen >> shift & kMask) < cutoff) {
    const uint32_t before = atomicCAS(word, seen, seen + (1u << shift));
    if (before == seen) return;
    seen = before;
  }
}

// The same in a tile. Wide counters may pass the cutoff by one per thread, which they have room for: addition, unlike
// compare-and-swap, does not try again where many events meet on a pixel.
template <int kBits>
__device__ __forceinline__ void increment_in_tile(uint32_t* words, unsigned cell, uint32_t cutoff) {
  if constexpr (kBits == 8) {
    increment_saturating<8>(words, cell, cutoff);
  } else {
    constexpr int kCounters = 32 / kBits;
    uint32_t* const word = words + cell / kCounters;
    const unsigned shift = kBits * (cell % kCounters);
    if ((*static_cast<volatile uint32_t*>(word) >> shift & 0xffffffffu >> (32 - kBits)) < cutoff)
      atomicAdd(word, 1u << shift);
  }
}

template <int kBits>
__device__ __forceinline__ uint32_t clamp_counters(uint32_t word, uint32_t cutoff) {
  if constexpr (kBits == 8) return word;
  if constexpr (kBits == 32) return word < cutoff ? word : cutoff;
  const uint32_t low = word & 0xffffu, high = word >> 16;
  return (low < cutoff ? low : cutoff) | (high < cutoff ? high : cutoff) << 16;
}

// The first and last time of an unsorted window, from the stretches inside it and the events beside them.
__device__ __forceinline__ void find_window_times(const EventColumns& events, const HistogramOrder& order,
                                                  EventRange range, int64_t window) {
  __shared__ long long of_warps[2][kTileThreads / 32];
  long long first = INT64_MAX, last = INT64_MIN;
  const int64_t from = ceil_div(range.begin, kHistogramStretch), until = range.end / kHistogramStretch;
  const auto include = [&](long long low, long long high) {
    first = low < first ? low : first;
    last = high > last ? high : last;
  };
  for (int64_t s = from + threadIdx.x; s < until; s += kTileThreads)
    include(order.stretches[s], order.stretches[order.stretch_count + s]);
  const auto include_events = [&](int64_t begin, int64_t end) {
    for (int64_t e = begin + threadIdx.x; e < end; e += kTileThreads) {
      const long long t = load_time(events, e);
      include(t, t);
    }
  };
  const int64_t head = from * kHistogramStretch < range.end ? from * kHistogramStretch : range.end;
  include_events(range.begin, head);
  include_events(until * kHistogramStretch > head ? until * kHistogramStretch : head, range.end);
  reduce_times(first, last);
  if (threadIdx.x % 32 == 0) {
    of_warps[0][threadIdx.x / 32] = first;
    of_warps[1][threadIdx.x / 32] = last;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kTileThreads / 32; ++warp) include(of_warps[0][warp], of_warps[1][warp]);
  order.first[window] = first;
  order.last[window] = last;
}

// A row as the strips share them out: those beyond 32 bits all go to the last strip, which drops them.
__device__ __forceinline__ uint32_t narrow_row(int64_t y) {
  return y < 0 || y > UINT32_MAX ? UINT32_MAX : static_cast<uint32_t>(y);
}

// Calls count(x, y, p) for those of events [begin, end) whose row is within `last_row` from first_row on.
template <class Count>
__device__ __forceinline__ void for_events_in_rows(const EventColumns& events, int64_t begin, int64_t end,
                                                   uint32_t first_row, uint32_t last_row, const Count& count) {
#pragma unroll 1
  for (int64_t e = begin + threadIdx.x; e < end; e += kTileThreads) {
    const int64_t y = load_integer(events.y, events.y_type, e);
    if (narrow_row(y) - first_row <= last_row)
      count(load_integer(events.x, events.x_type, e), y, load_integer(events.p, events.p_type, e));
  }
}

// The same for columns x, y of 16 bits and p of 8, of images of at most 2^15 rows and columns: negative numbers read as
// larger ones. Takes whole packs of eight events, `from` to `until`, four per thread and round.
//
// Two rows are compared at once: with the upper bit of each half of a word set, a difference keeps it unless it is
// negative, and no half borrows from the other. A third of a warp's lanes take part in counting what they have found; a
// queue that gives every lane one of the warp's events took 3 to 37 % more instructions on recordings.
template <class Count>
__device__ __forceinline__ void for_packs_in_rows(const EventColumns& events, int64_t from, int64_t until,
                                                  uint32_t first_row, uint32_t last_row, const Count& count) {
  constexpr int kPack = 8, kPacks = 4;
  constexpr uint32_t kUpper = 0x80008000u;
  const uint32_t last = first_row + last_row;
  const bool is_last = last >= 0x7fffu;  // takes all rows from the first, negative ones as well
  const uint32_t to_first = kUpper - first_row * 0x10001u;
  const uint32_t beyond_last = is_last ? 0 : (0x7fffu - last_row) * 0x10001u;
  const auto* const x = static_cast<const uint16_t*>(events.x);
  const auto* const y = static_cast<const uint16_t*>(events.y);
  const auto* const p = static_cast<const uint8_t*>(events.p);
  const bool is_signed = events.p_type == IntType::kInt8;
#pragma unroll 1
  for (int64_t base = from + threadIdx.x; base < until; base += kPacks * kTileThreads) {
    // Of pack k, event 2i + 1 stands at bit 31 - (4k + i) and event 2i 16 bits below.
    uint32_t hits = 0;
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      const int64_t at = base + k * kTileThreads;
      if (at >= until) break;
      const auto rows = load_packed<4>(reinterpret_cast<const uint32_t*>(y) + at * 4);
      const uint32_t negative = (rows[0] | rows[1] | rows[2] | rows[3]) & kUpper;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t above = (rows[i] & ~kUpper) + to_first, beyond = (above & ~kUpper) + beyond_last;
        hits |= (above & ~beyond & kUpper) >> (4 * k + i);
      }
      if (negative) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t those = (rows[i] & kUpper) >> (4 * k + i);
          hits = is_last ? hits | those : hits & ~those;
        }
      }
    }
    while (hits) {
      const unsigned zeros = __clz(static_cast<int>(hits));
      hits &= 0x7fffffffu >> zeros;
      const int64_t e = base * kPack + (zeros & 12) * (kTileThreads * kPack / 4) + (zeros & 3) * 2 + (zeros < 16);
      const int polarity = p[e];
      count(static_cast<unsigned>(x[e]), static_cast<unsigned>(y[e]),
            is_signed ? static_cast<int8_t>(polarity) : polarity);
    }
  }
}

// Whether for_packs_in_rows can read the columns.
__device__ __forceinline__ bool has_packs(const EventColumns& events, const HistogramShape& shape) {
  const auto is_short = [](IntType type) { return type == IntType::kInt16 || type == IntType::kUInt16; };
  return is_short(events.x_type) && is_short(events.y_type) &&
         (events.p_type == IntType::kInt8 || events.p_type == IntType::kUInt8) && shape.height <= 1 << 15 &&
         shape.width <= 1 << 15 && reinterpret_cast<uintptr_t>(events.y) % 16 == 0;
}

template <int kBits>
__global__ void __launch_bounds__(kTileThreads, 2)
    event_histogram_tile_kernel(EventColumns events, EventWindows windows, HistogramShape shape, HistogramTile tile,
                                int64_t count, HistogramOrder order, uint32_t* __restrict__ out,
                                unsigned long long* dropped) {
  EVKERNELS_DYNAMIC_SHARED(uint32_t, counters);
  constexpr int kCounters = 32 / kBits, kPerPack = 4 * kCounters;  // in a word, in 16 bytes
  const int bins = static_cast<int>(shape.bins);
  const unsigned width = static_cast<unsigned>(shape.width);
  const unsigned strips = static_cast<unsigned>(ceil_div(shape.height, tile.rows));
  const unsigned strip = blockIdx.x % strips, bin = blockIdx.x / strips % bins;
  const int64_t window = blockIdx.x / strips / bins;
  const EventRange range = range_of_window(windows, window, count);

  int sorted = tile.span > 0;
  for (int64_t s = range.begin / kHistogramStretch + threadIdx.x; s * kHistogramStretch < range.end; s += kTileThreads)
    sorted &= order.stretches[2 * order.stretch_count + s] != 0;
  for (int64_t k = threadIdx.x; k < tile.span * 2 / kPerPack; k += kTileThreads)
    reinterpret_cast<Packed<uint32_t, 4>*>(counters)[k] = {};
  sorted = __syncthreads_and(sorted);
  if (bin == 0 && strip == 0) {
    if (threadIdx.x == 0) order.is_sorted[window] = sorted;
    if (!sorted && range.begin < range.end) find_window_times(events, order, range, window);
  }

  const int64_t first_row = static_cast<int64_t>(strip) * tile.rows;
  const unsigned rows =
      static_cast<unsigned>(shape.height - first_row < tile.rows ? shape.height - first_row : tile.rows);
  if (sorted && range.begin < range.end) {
    const long long* const begins = order.begins + window * (bins + 1) + bin;
    // Holds by itself unless `offsets` is no partition.
    const int64_t begin = begins[0] < range.begin ? range.begin : begins[0],
                  end = begins[1] < range.end ? begins[1] : range.end;
    // The last strip takes what lies below the image as well, and drops it.
    const uint32_t from_row = static_cast<uint32_t>(first_row);
    const uint32_t last_row = strip == strips - 1 ? UINT32_MAX - from_row : rows - 1;
    unsigned drops = 0;
    const auto count_event = [&](auto x, auto y, auto p) {
      using Unsigned = std::make_unsigned_t<decltype(x)>;
      const Unsigned row = static_cast<Unsigned>(y) - from_row;
      if (static_cast<Unsigned>(x) >= width || row >= rows || p < -1 || p > 1) {
        ++drops;
        return;
      }
      const unsigned cell = static_cast<unsigned>(row) * width + static_cast<unsigned>(x);
      increment_in_tile<kBits>(counters, cell + (p > 0 ? static_cast<unsigned>(tile.span) : 0), shape.cutoff);
    };
    const int64_t packs_from = ceil_div(begin, 8), packs_until = end / 8;
    if (has_packs(events, shape) && packs_from < packs_until) {
      for_packs_in_rows(events, packs_from, packs_until, from_row, last_row, count_event);
      for_events_in_rows(events, begin, packs_from * 8, from_row, last_row, count_event);
      for_events_in_rows(events, packs_until * 8, end, from_row, last_row, count_event);
    } else {
      for_events_in_rows(events, begin, end, from_row, last_row, count_event);
    }
    if (drops) atomicAdd(dropped, static_cast<unsigned long long>(drops));
  }
  __syncthreads();

  const unsigned cells = rows * width;
#pragma unroll 1
  for (int polarity = 0; polarity < 2; ++polarity) {
    const int64_t plane = (2 * window + polarity) * bins + bin;
    const int64_t to = (plane * shape.height + first_row) * width;
    const uint32_t* const from = counters + (polarity ? tile.span / kCounters : 0);
    const unsigned packs = to % kPerPack == 0 ? cells / kPerPack : 0;
    for (unsigned k = threadIdx.x; k < packs; k += kTileThreads) {
      Packed<uint32_t, 4> pack{};
      if (sorted) pack = *reinterpret_cast<const Packed<uint32_t, 4>*>(from + 4 * k);
#pragma unroll
      for (int i = 0; i < 4; ++i) pack[i] = clamp_counters<kBits>(pack[i], shape.cutoff);
      store_packed(out + to / kCounters + 4 * k, pack);
    }
    using Counter = std::conditional_t<kBits == 8, uint8_t, std::conditional_t<kBits == 16, uint16_t, uint32_t>>;
    for (int64_t k = packs * kPerPack + threadIdx.x; k < cells; k += kTileThreads) {
      const uint32_t value = sorted ? reinterpret_cast<const Counter*>(from)[k] : 0;
      reinterpret_cast<Counter*>(out)[to + k] =
          static_cast<Counter>(value < static_cast<uint32_t>(shape.cutoff) ? value : shape.cutoff);
    }
  }
}

// Rows of a strip: as many as fit, a multiple of as many as make whole 16-byte words, shared out evenly.
inline HistogramTile histogram_tile(const HistogramShape& shape, int bits, int64_t bytes) {
  const int64_t row_bytes = shape.width * bits / 8;
  const int64_t fitting = bytes / 2 / row_bytes;
  int64_t whole = 1;
  while (whole < 16 && whole * row_bytes % 16 != 0) whole *= 2;
  const auto rounded_up = [](int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; };
  int64_t rows = fitting >= whole ? fitting / whole * whole : fitting;
  if (rows < 1) rows = 1;
  if (rows > shape.height) rows = shape.height;
  if (rows % whole == 0) rows = rounded_up(ceil_div(shape.height, ceil_div(shape.height, rows)), whole);
  const int64_t span = fitting < 1 ? 0 : rounded_up(rows * shape.width, 128 / bits);
  return {static_cast<int>(rows), 2 * span * bits / 8 <= bytes ? span : 0};
}

// The tiles with which the multiprocessor that gets the most of them has the least to do, from the largest that fit to
// half as large ones. Each looks at all events of its bin, counts its share of them, which takes twice as long, and
// writes its cells, of which six take as long as a look at an event. On 108 multiprocessors a VGA window of 10 bins has
// 100 tiles so; 130 small ones, of which 22 come second, took 1.8 times as long on paper.
inline HistogramTile histogram_tile(const HistogramShape& shape, int bits, int64_t windows, int64_t events,
                                    int64_t& tiles) {
  const int64_t columns = windows * shape.bins, multiprocessors = multiprocessor_count();
  const double of_bin = static_cast<double>(events) / static_cast<double>(columns);
  const double cells = 2.0 * static_cast<double>(shape.height * shape.width);
  HistogramTile best = histogram_tile(shape, bits, kLargestTile);
  const int64_t fewest = ceil_div(shape.height, best.rows);
  double least = 0;
  for (int64_t wanted = fewest; wanted <= 2 * fewest && wanted <= shape.height; ++wanted) {
    const int64_t bytes = 32 * ceil_div(ceil_div(shape.height, wanted) * shape.width * bits / 8, 16);
    const HistogramTile tile = wanted == fewest ? best : histogram_tile(shape, bits, bytes);
    const int64_t strips = ceil_div(shape.height, tile.rows);
    const double cost = static_cast<double>(ceil_div(columns * strips, multiprocessors)) *
                        (of_bin + (2 * of_bin + cells / 6) / static_cast<double>(strips));
    if (wanted == fewest || cost < least) {
      least = cost;
      best = tile;
    }
  }
  tiles = columns * ceil_div(shape.height, best.rows);
  return best;
}

}  // namespace evkernels
