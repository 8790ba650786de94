// Loops of time_surface over some rows of one window, compiled once per instruction set.
//
// Every event replaces what its cell holds by the maximum of both, so that the order of the events does not matter.
// That is also the fastest form: 0.9 ns per event at 640x480 and 1e6 events on one Zen 5 core, where a plain store
// after a check of the order takes 1.3, either with prefetched cells 1.1 to 1.8, 32-bit times widened at the end 1.3,
// and events sorted into tiles of the surface that fit the level-2 cache 2.4. On a Zen 3 core with AVX2 prefetched
// cells take 0.5 to 0.8 of the time of none where events are spread evenly, and up to 1.2 times it where few pixels
// have most.
//
// A decayed surface holds -age in float32 while it is filled, in the memory of the result: rounding keeps the order, so
// the maximum of the rounded values is the rounded maximum.

#include "common/event_cells.inl"
#include "common/event_rows.inl"
#include "time_surface/decay.inl"

// What a cell holds while it is filled: the time, or minus the age at time `at`.
EVKERNELS_INLINE void to_held(int64_t t, int64_t, int64_t& held) { held = t; }
EVKERNELS_INLINE void to_held(int64_t t, int64_t at, float& held) {
  const int64_t difference = wrapping_difference(t, at);
  held = (float)(difference < 0 ? difference : 0);
}
EVKERNELS_INLINE int64_t held_of_never(int64_t) { return kNever; }
EVKERNELS_INLINE float held_of_never(float) { return -__builtin_inff(); }

template <class S>
static void start_cells(const int64_t* __restrict__ previous, int64_t count, int64_t at, S* __restrict__ cells) {
  const S never = held_of_never(S());
  if (!previous) {
    for (int64_t k = 0; k < count; ++k) cells[k] = never;
    return;
  }
  for (int64_t k = 0; k < count; ++k) {
    S held;
    to_held(previous[k], at, held);
    cells[k] = previous[k] == kNever ? never : held;
  }
}

// Starts the rows [first_row, last_row) of a window's surface, from the rows of `previous` or empty where that is null.
template <class S>
static void start_rows(SurfaceShape shape, int64_t first_row, int64_t last_row, int64_t at, const int64_t* previous,
                       S* surface) {
  // The caller may go on in place.
  if ((const void*)previous == (const void*)surface) return;
  for (int64_t k = 0; k < shape.polarities; ++k) {
    const int64_t first_cell = (k * shape.height + first_row) * shape.width;
    start_cells(previous ? previous + first_cell : previous, (last_row - first_row) * shape.width, at,
                surface + first_cell);
  }
}

// Rows [first, last) of an image.
struct Rows {
  int64_t first, last;
};

// Gives 255 to the events whose cells are in `rows`, 0 to others and to those without a cell. Rows of 16 bits are
// compared as they are if `y` is not null, where every event must have a cell.
EVKERNELS_INLINE void choose_rows(const SurfaceShape& shape, Rows rows, const uint16_t* __restrict__ y,
                                  const int64_t* __restrict__ cell, int64_t count, uint8_t* __restrict__ chosen) {
  if (y) {
    const uint16_t first = (uint16_t)rows.first, size = (uint16_t)(rows.last - rows.first);
    for (int64_t k = 0; k < count; ++k) chosen[k] = (uint16_t)(y[k] - first) < size ? 255 : 0;
    return;
  }
  const uint64_t size = (rows.last - rows.first) * shape.width;
  const int64_t off = rows.first * shape.width, on = off + (shape.polarities - 1) * shape.height * shape.width;
  for (int64_t k = 0; k < count; ++k) {
    const bool is_own = ((uint64_t)(cell[k] - off) < size) | ((uint64_t)(cell[k] - on) < size);
    chosen[k] = is_own ? 255 : 0;
  }
}

// What list_chosen may write beyond the indices.
constexpr int64_t kListMargin = 16;

// Lists which of a block's events are chosen; returns how many they are.
EVKERNELS_INLINE int64_t list_chosen(const uint8_t* __restrict__ chosen, int32_t* __restrict__ index) {
  int64_t listed = 0;
#if defined(__x86_64__) && EVKERNELS_LANES == 16
  __m512i events = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int64_t k = 0; k < kBlock; k += 16) {
    const __mmask16 mask = _mm_movepi8_mask(_mm_loadu_si128((const __m128i*)(chosen + k)));
    _mm512_storeu_si512(index + listed, _mm512_maskz_compress_epi32(mask, events));
    listed += __builtin_popcount(mask);
    events = _mm512_add_epi32(events, _mm512_set1_epi32(16));
  }
#else
  for (int64_t k = 0; k < kBlock; ++k) {
    index[listed] = (int32_t)k;
    listed += chosen[k] & 1;
  }
#endif
  return listed;
}

template <class T>
static int64_t maximum(const T* __restrict__ t, int64_t count, int64_t latest) {
  T in_block = t[0];
  for (int64_t k = 1; k < count; ++k) in_block = t[k] > in_block ? t[k] : in_block;
  return in_block > latest ? in_block : latest;
}

template <class S>
EVKERNELS_INLINE void keep_larger(S held, S& cell) {
  cell = cell > held ? cell : held;
}

// Ages are converted in a loop of their own, which vectorises.
template <class T, class S>
EVKERNELS_INLINE void hold_block(const T* __restrict__ t, int64_t at, int64_t count, S* __restrict__ held) {
  for (int64_t k = 0; k < count; ++k) to_held(t[k], at, held[k]);
}

// Without AVX-512 a whole surface is filled in runs of several blocks with the cells ahead prefetched, as in the event
// accumulator: far enough ahead to hide the way to the third-level cache, few enough to stay in the first.
constexpr bool kHasRuns = EVKERNELS_LANES < 16;
constexpr int64_t kRun = 512, kAhead = 64;

// Keeps `count` events; `cell` has kAhead more elements, which are valid cells too.
template <class H, class S>
static void keep_ahead(const H* __restrict__ held, const int64_t* __restrict__ cell, int64_t count,
                       S* __restrict__ surface) {
#pragma GCC unroll 4
  for (int64_t k = 0; k < count; ++k) {
    __builtin_prefetch(surface + cell[k + kAhead], 1);
    keep_larger((S)held[k], surface[cell[k]]);
  }
}
template <class T>
EVKERNELS_INLINE void keep_run(const T* __restrict__ t, int64_t, const int64_t* __restrict__ cell,
                               int64_t* __restrict__ surface) {
  keep_ahead(t, cell, kRun, surface);
}
template <class T>
EVKERNELS_INLINE void keep_run(const T* __restrict__ t, int64_t at, const int64_t* __restrict__ cell,
                               float* __restrict__ surface) {
  float held[kRun];
  hold_block(t, at, kRun, held);
  keep_ahead(held, cell, kRun, surface);
}

// Events chosen from several blocks, which wait to be kept as a run.
template <class S>
struct Waiting {
  int64_t cell[kRun + kBlock + kAhead];
  S held[kRun + kBlock];
  int64_t count = 0;

  // Adds the chosen ones of a block: every event takes two stores.
  void add(const uint8_t* __restrict__ chosen, const int64_t* __restrict__ own_cell, const S* __restrict__ own_held) {
    int64_t at = count;
    for (int64_t k = 0; k < kBlock; ++k) {
      cell[at] = own_cell[k];
      held[at] = own_held[k];
      at += chosen[k] & 1;
    }
    count = at;
  }

  void keep(S* surface) {
    // What is behind the last one is left from runs before, or of no event.
    for (int64_t k = count; k < count + kAhead; ++k) cell[k] = 0;
    keep_ahead(held, cell, count, surface);
    count = 0;
  }
};

// Keeps the events of a whole block, of which none is without a cell.
template <class T>
EVKERNELS_INLINE void keep_block(const T* __restrict__ t, int64_t, const int64_t* __restrict__ cell,
                                 int64_t* __restrict__ surface) {
  for (int64_t k = 0; k < kBlock; ++k) keep_larger((int64_t)t[k], surface[cell[k]]);
}
template <class T>
EVKERNELS_INLINE void keep_block(const T* __restrict__ t, int64_t at, const int64_t* __restrict__ cell,
                                 float* __restrict__ surface) {
  float held[kBlock];
  hold_block(t, at, kBlock, held);
  for (int64_t k = 0; k < kBlock; ++k) keep_larger(held[k], surface[cell[k]]);
}

// Keeps the events of a block whose cells are in `rows`. All but the maxima is computed for every event, in vectors:
// done in the loop of the maxima, for the chosen events only, it leaves room for fewer cache misses at once, and that
// loop takes up to twice as long.
template <class T, class S>
static void keep_chosen(const T* __restrict__ t, int64_t at, const SurfaceShape& shape, Rows rows, const uint16_t* y,
                        const int64_t* __restrict__ cell, int64_t count, Waiting<S>& waiting, S* __restrict__ surface) {
  uint8_t chosen[kBlock] = {};
  S held[kBlock];
  if (count == kBlock) {
    choose_rows(shape, rows, y, cell, kBlock, chosen);
    hold_block(t, at, kBlock, held);
  } else {
    choose_rows(shape, rows, y, cell, count, chosen);
    hold_block(t, at, count, held);
  }
  if constexpr (kHasRuns) {
    waiting.add(chosen, cell, held);
    if (waiting.count >= kRun) waiting.keep(surface);
  } else {
    int32_t index[kBlock + kListMargin];
    const int64_t listed = list_chosen(chosen, index);
    for (int64_t k = 0; k < listed; ++k) keep_larger(held[index[k]], surface[cell[index[k]]]);
  }
}

// Starts the rows [first_row, last_row) of a window's surface, from the rows of `previous` or empty where that is null,
// and fills them with the events [begin, end). Returns how many are outside the sensor; for S = float, `latest` becomes
// at least the time of each of them, those outside included, so that where it exceeds `at` another `at` can be tried.
template <class T, class S>
static int64_t fill_rows(const T* t, EventColumns events, PixelMap map, SurfaceShape shape, int64_t begin, int64_t end,
                         int64_t first_row, int64_t last_row, int64_t at, const int64_t* previous, S* surface,
                         int64_t& latest) {
  const int64_t plane = shape.height * shape.width;
  const int64_t on = (shape.polarities - 1) * plane;
  start_rows(shape, first_row, last_row, at, previous, surface);
  const bool is_whole = last_row - first_row == shape.height;
  const bool has_narrow_rows = !map.cells && is_narrow(events, plane) && shape.height < 1 << 16;
  int64_t cell[kHasRuns ? kRun + kAhead : kBlock];
  for (int64_t k = kRun; kHasRuns && k < kRun + kAhead; ++k) cell[k] = 0;
  int64_t dropped = 0;
  Waiting<S> waiting;
  bool in_runs = kHasRuns && is_whole;
  for (int64_t event = begin; event < end; event += kBlock) {
    // Runs end with the first one that has an event without a cell, which is then read again.
    for (; in_runs && end - event >= kRun; event += kRun) {
      for (int64_t k = 0; in_runs && k < kRun; k += kBlock)
        in_runs = !read_cells(events, map, plane, on, event + k, kBlock, cell + k).any;
      if (!in_runs) break;
      if constexpr (sizeof(S) == sizeof(float)) latest = maximum(t + event, kRun, latest);
      keep_run(t + event, at, cell, surface);
    }
    const int64_t count = end - event < kBlock ? end - event : kBlock;
    if (count == 0) break;
    const Gaps gaps = read_cells(events, map, plane, on, event, count, cell);
    dropped += gaps.out_of_range;
    if constexpr (sizeof(S) == sizeof(float)) latest = maximum(t + event, count, latest);
    if (is_whole && !gaps.any && count == kBlock) {
      keep_block(t + event, at, cell, surface);
    } else {
      const uint16_t* const y = has_narrow_rows && !gaps.any ? (const uint16_t*)events.y + event : nullptr;
      keep_chosen(t + event, at, shape, Rows{first_row, last_row}, y, cell, count, waiting, surface);
    }
  }
  if constexpr (kHasRuns) waiting.keep(surface);
  return dropped;
}

// The same for events that can be chosen by their rows. Threads that have rows of the same window return together how
// many are outside the sensor, and find the latest time; who has the first row counts the events outside all rows.
template <class T, class S>
static int64_t fill_shared_rows(const T* t, EventColumns events, PixelMap map, SurfaceShape shape, int64_t begin,
                                int64_t end, int64_t first_row, int64_t last_row, int64_t at, const int64_t* previous,
                                S* surface, int64_t& latest) {
  const int64_t plane = shape.height * shape.width;
  const int64_t on = (shape.polarities - 1) * plane;
  start_rows(shape, first_row, last_row, at, previous, surface);
  RowEvents<T> own;
  int64_t cell[kRowRun + kAhead], dropped = 0, latest_of_own = latest;
  S held[kRowRun];
  const auto keep_own = [&](int64_t count) {
    bool has_gaps = false;
    for (int64_t k = 0; k < count; k += kBlock) {
      const int64_t in_block = count - k < kBlock ? count - k : kBlock;
      const Gaps gaps = read_cells(own.columns(events), map, plane, on, k, in_block, cell + k);
      dropped += gaps.out_of_range;
      has_gaps |= gaps.any;
    }
    if constexpr (sizeof(S) == sizeof(float)) latest_of_own = maximum(own.t, count, latest_of_own);
    hold_block(own.t, at, count, held);
    int64_t kept = has_gaps ? 0 : count;
    for (int64_t k = 0; has_gaps && k < count; ++k) {
      held[kept] = held[k];
      cell[kept] = cell[k];
      kept += cell[k] >= 0;
    }
    if (kept == 0) return;
    // What is prefetched behind the last one is this thread's too.
    for (int64_t k = kept; k < kept + kAhead; ++k) cell[k] = cell[0];
    keep_ahead(held, cell, kept, surface);
  };
  for (int64_t event = begin; event < end; event += kRowBlock) {
    const int64_t count = end - event < kRowBlock ? end - event : kRowBlock;
    add_of_rows(events, t, first_row, last_row - first_row, event, count, own);
    if (first_row == 0) {
      const int64_t outside = count_outside_rows(events, shape.height, event, count);
      dropped += outside;
      if (outside) latest_of_own = maximum(t + event, count, latest_of_own);
    }
    if (own.count < kRowRun) continue;
    keep_own(kRowRun);
    own.remove(kRowRun);
  }
  if (own.count) keep_own(own.count);
  // Written once: other threads' are next to it.
  latest = latest_of_own;
  return dropped;
}
