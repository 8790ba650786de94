// The events of some of an image's rows, chosen from all of a window's. Part of a loop file, behind event_cells.inl.
//
// Threads that share one window have rows of the image each, read all of its events and go on with their own: no thread
// writes what another one reads. That pays where choosing is fast: the columns of the chosen events are moved together,
// eight events at a time and without a branch, and only then brought to cells. What lost, on two cores of a Zen 3 that
// need 450 ns to pass a cache line on:
// - cells computed for all events first and chosen ones then moved by two stores per event: two threads were 0.9 to 1.3
//   times as fast as one;
// - events shared between threads, which pass each other those of their rows in lists: less work, but 0.6 to 1.3 times,
//   because the lists move from one core's cache to the other's;
// - sums of different threads side by side in memory, written after each block: up to 1.6 times the time.

// The bits of 64 events that are chosen.
EVKERNELS_INLINE uint64_t bits_of(const uint8_t* __restrict__ chosen) {
  uint64_t bits = 0;
#if defined(__x86_64__) && EVKERNELS_LANES >= 8
  for (int64_t k = 0; k < 64; k += 32)
    bits |= (uint64_t)(uint32_t)_mm256_movemask_epi8(_mm256_loadu_si256((const __m256i*)(chosen + k))) << k;
#elif defined(__x86_64__)
  for (int64_t k = 0; k < 64; k += 16)
    bits |= (uint64_t)_mm_movemask_epi8(_mm_loadu_si128((const __m128i*)(chosen + k))) << k;
#else
  for (int64_t k = 0; k < 64; ++k) bits |= (uint64_t)(chosen[k] & 1) << k;
#endif
  return bits;
}

// Events of a thread's rows, in columns: uint16 x and y, uint8 p and, where they are needed, times.
constexpr int64_t kRowRun = 512, kRowBlock = 64;
template <class T>
struct RowEvents {
  uint16_t x[kRowRun + kRowBlock + 8], y[kRowRun + kRowBlock + 8];
  uint8_t p[kRowRun + kRowBlock + 8];
  T t[kRowRun + kRowBlock + 8];
  int64_t count = 0;

  // The same as columns of a window.
  EventColumns columns(const EventColumns& events) const {
    return {x, y, t, p, events.x_type, events.y_type, events.t_type, events.p_type};
  }
  // Removes the first ones, no fewer than half.
  void remove(int64_t removed) {
    count -= removed;
    __builtin_memcpy(x, x + removed, count * sizeof(*x));
    __builtin_memcpy(y, y + removed, count * sizeof(*y));
    __builtin_memcpy(p, p + removed, count * sizeof(*p));
    __builtin_memcpy(t, t + removed, count * sizeof(*t));
  }
};

#if defined(__x86_64__) && EVKERNELS_LANES >= 8
// For each subset of eight and of four elements, where these are: in bytes of eight elements of 16 bits, as indices of
// four elements and of the halves of four elements of 64 bits.
struct Subsets {
  uint8_t byte_of_8[256][16] = {};
  int32_t of_4[16][4] = {}, half_of_4[16][8] = {};

  constexpr Subsets() {
    for (int32_t subset = 0; subset < 256; ++subset) {
      for (int32_t k = 0, count = 0; k < 8; ++k) {
        if (!(subset >> k & 1)) continue;
        for (int32_t half = 0; half < 2; ++half) {
          byte_of_8[subset][2 * count + half] = (uint8_t)(2 * k + half);
          if (subset < 16) half_of_4[subset][2 * count + half] = 2 * k + half;
        }
        if (subset < 16) of_4[subset][count] = k;
        ++count;
      }
    }
  }
};
static constexpr Subsets kSubsets;

EVKERNELS_INLINE void store_subset(const int64_t* from, int64_t subset, int64_t* to) {
  const __m256i places = _mm256_loadu_si256((const __m256i*)kSubsets.half_of_4[subset]);
  _mm256_storeu_si256((__m256i*)to, _mm256_permutevar8x32_epi32(_mm256_loadu_si256((const __m256i*)from), places));
}
EVKERNELS_INLINE void store_subset(const int32_t* from, int64_t subset, int32_t* to) {
  const __m128i places = _mm_loadu_si128((const __m128i*)kSubsets.of_4[subset]);
  _mm_storeu_ps((float*)to, _mm_permutevar_ps(_mm_loadu_ps((const float*)from), places));
}
#endif

// Adds those of the events [event, event + count), no more than kRowBlock, that are in the rows
// [first_row, first_row + rows). `t` is null where times are not needed.
template <class T>
EVKERNELS_INLINE void add_of_rows(const EventColumns& events, const T* t, int64_t first_row, int64_t rows,
                                  int64_t event, int64_t count, RowEvents<T>& own) {
  const uint16_t* __restrict__ const x = (const uint16_t*)events.x + event;
  const uint16_t* __restrict__ const y = (const uint16_t*)events.y + event;
  const uint8_t* __restrict__ const p = (const uint8_t*)events.p + event;
  const uint16_t first = (uint16_t)first_row, size = (uint16_t)rows;
  uint8_t chosen[kRowBlock] = {};
  int64_t at = own.count;
#if defined(__x86_64__) && EVKERNELS_LANES >= 8
  if (count == kRowBlock) {
    for (int64_t k = 0; k < kRowBlock; ++k) chosen[k] = (uint16_t)(y[k] - first) < size ? 255 : 0;
    uint64_t bits = bits_of(chosen);
#pragma GCC unroll 2
    for (int64_t k = 0; k < kRowBlock; k += 8) {
      const int64_t subset = bits & 255;
      const __m128i places = _mm_loadu_si128((const __m128i*)kSubsets.byte_of_8[subset]);
      _mm_storeu_si128((__m128i*)(own.x + at), _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)(x + k)), places));
      _mm_storeu_si128((__m128i*)(own.y + at), _mm_shuffle_epi8(_mm_loadu_si128((const __m128i*)(y + k)), places));
      const __m128i wide = _mm_shuffle_epi8(_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)(p + k))), places);
      _mm_storel_epi64((__m128i*)(own.p + at), _mm_packus_epi16(wide, wide));
      if (t) {
        store_subset(t + event + k, subset & 15, own.t + at);
        store_subset(t + event + k + 4, subset >> 4, own.t + at + __builtin_popcountll(subset & 15));
      }
      at += __builtin_popcountll(subset);
      bits >>= 8;
    }
    own.count = at;
    return;
  }
#endif
  for (int64_t k = 0; k < count; ++k) chosen[k] = (uint16_t)(y[k] - first) < size ? 255 : 0;
  for (uint64_t bits = bits_of(chosen); bits; bits &= bits - 1, ++at) {
    const int64_t k = __builtin_ctzll(bits);
    own.x[at] = x[k];
    own.y[at] = y[k];
    own.p[at] = p[k];
    if (t) own.t[at] = t[event + k];
  }
  own.count = at;
}

// How many of some events are in no row of the image.
EVKERNELS_INLINE int64_t count_outside_rows(const EventColumns& events, int64_t height, int64_t event, int64_t count) {
  const uint16_t* __restrict__ const y = (const uint16_t*)events.y + event;
  const int32_t limit = unsigned_limit(events.y_type, height);
  int32_t outside = 0;
  for (int64_t k = 0; k < count; ++k) outside += y[k] >= limit;
  return outside;
}
