// Sharing the rows of one large window between threads: who has which, on the CPU. The loops that choose a thread's
// events are in event_rows.inl.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/event_columns.h"

namespace evkernels {

// A window of so many events is shared between threads; more than so many threads gain nothing where all read all
// events.
constexpr int64_t kSharedWindow = 1 << 15, kMostRowThreads = 16;

// Whether the events can be chosen by their rows: the types that cameras use, and no map that takes them elsewhere.
// Read as uint16, a negative y is from 2^15 on and must be no row.
inline bool has_sensor_rows(const EventColumns& events, const PixelMap& map) {
  const auto is_16_bits = [](IntType type) { return type == IntType::kInt16 || type == IntType::kUInt16; };
  return !map.cells && map.height <= 1 << 15 && map.height * map.width < int64_t{1} << 31 &&
         is_16_bits(events.x_type) && is_16_bits(events.y_type) &&
         (events.p_type == IntType::kInt8 || events.p_type == IntType::kUInt8);
}

// Where the rows of each of so many threads begin and, as the last entry, where the last ones end: by a sample of the
// events [begin, end), about the same work for each. A row takes the time of `row_work` events besides its own.
inline std::vector<int64_t> share_rows(const EventColumns& events, int64_t height, int64_t begin, int64_t end,
                                       int64_t row_work, int64_t threads) {
  constexpr int64_t kPlaces = 16, kPerPlace = 64;
  const uint16_t* const y = static_cast<const uint16_t*>(events.y);
  const int64_t weight = std::max<int64_t>(1, (end - begin) / (kPlaces * kPerPlace));
  std::vector<int64_t> work(height, row_work), borders(threads + 1, height);
  for (int64_t place = 0; place < kPlaces; ++place) {
    const int64_t first = begin + (end - begin) * place / kPlaces;
    for (int64_t event = first; event < std::min(end, first + kPerPlace); ++event) {
      if (y[event] < height) work[y[event]] += weight;
    }
  }
  int64_t total = 0, before = 0, row = 0;
  for (const int64_t of_row : work) total += of_row;
  for (int64_t thread = 0; thread < threads; ++thread) {
    // A row belongs to the thread in whose share its middle is.
    while (row < height && (2 * before + work[row]) * threads < 2 * thread * total) before += work[row++];
    borders[thread] = row;
  }
  return borders;
}

}  // namespace evkernels
