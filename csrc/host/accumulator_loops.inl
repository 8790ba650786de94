// Loops of the event accumulator, compiled once per instruction set.
//
// Fields of structures are gathered, block by block, into columns in level-1 cache: from there on they are columns like
// any other. Whether all events are inside is looked at first, because nothing of a packet may be added before all of
// it is known to be good. Cells are checked again as they are computed: the memory may be written to in between.

#include "common/event_cells.inl"

// Long blocks, because each column's type is looked at per block and what is ahead of its end is not prefetched.
constexpr int64_t kLongBlock = 512;

template <class T>
static void gather(const char* from, int64_t stride, int64_t count, int64_t* block) {
  T* __restrict__ out = (T*)block;
  for (int64_t k = 0; k < count; ++k) __builtin_memcpy(out + k, from + k * stride, sizeof(T));
}

// `count` elements of a column from `first` on: where they are, or copied to `block`.
static const void* contiguous(const PacketColumn& column, int64_t first, int64_t count, int64_t* block) {
  const char* const from = column.data + first * column.stride;
  const int64_t size = size_of(column.type);
  if (column.stride == size && (uintptr_t)from % size == 0) return from;
  switch (size) {
    case 1:
      gather<uint8_t>(from, column.stride, count, block);
      break;
    case 2:
      gather<uint16_t>(from, column.stride, count, block);
      break;
    case 4:
      gather<uint32_t>(from, column.stride, count, block);
      break;
    default:
      gather<uint64_t>(from, column.stride, count, block);
  }
  return block;
}

// Whether all values are in [low, low + size).
template <class T>
static bool is_within(const T* data, int64_t stride, int64_t count, int64_t low, int64_t size) {
  using U = typename Unsigned<T>::Type;
  const char* const from = (const char*)data;
  U outside = 0;
  const auto look = [&](int64_t k, int64_t step) __attribute__((always_inline)) {
    T value;
    __builtin_memcpy(&value, from + k * step, sizeof(T));
    // One operation after the other, where the largest value would take a comparison and a move.
    outside |= (U)((U)value - (U)low) >= (U)size;
  };
  if (stride == sizeof(T)) {
    for (int64_t k = 0; k < count; ++k) look(k, sizeof(T));
  } else {
    for (int64_t k = 0; k < count; ++k) look(k, stride);
  }
  return !outside;
}

static bool is_block_within(const PacketColumn& column, int64_t first, int64_t count, int64_t low, int64_t size) {
  bool result = false;
  with_type(column.type, column.data + first * column.stride, 0,
            [&](auto data) { result = is_within(data, column.stride, count, low, size); });
  return result;
}

// Whether no event is outside the sensor or has another polarity than -1, 0 or 1. In blocks, so that structures are
// fetched once for all of their fields.
static bool is_inside(EventPacket packet, EventPlanes planes) {
  for (int64_t event = 0; event < packet.count; event += kLongBlock) {
    const int64_t count = packet.count - event < kLongBlock ? packet.count - event : kLongBlock;
    if (!is_block_within(packet.x, event, count, 0, planes.width) ||
        !is_block_within(packet.y, event, count, 0, planes.height) || !is_block_within(packet.p, event, count, -1, 3)) {
      return false;
    }
  }
  return true;
}

// The time is that of the cache misses: plain stores, for packets that are newer than all before, take as long with
// prefetched cells and 1.4 to 1.9 times as long without; short blocks without prefetching take as long as these.
//
// Far enough ahead to hide the way to the third-level cache, few enough to stay in the first. On a Zen 3 with AVX2 24
// events ahead take 1.1 to 1.2 times as long at 1280x720, and as long at 640x480.
constexpr int64_t kAhead = EVKERNELS_LANES == 16 ? 24 : 64;

template <class T>
static void keep_latest(const T* __restrict__ t, const int64_t* __restrict__ cell, int64_t count,
                        int64_t* __restrict__ times) {
  for (int64_t k = 0; k < count; ++k) {
    __builtin_prefetch(times + cell[k + kAhead], 1);
    int64_t& held = times[cell[k]];
    held = held > (int64_t)t[k] ? held : (int64_t)t[k];
  }
}

// Counters stop at their largest value.
static void count_events(const int64_t* __restrict__ cell, int64_t count, int32_t* __restrict__ counts) {
  for (int64_t k = 0; k < count; ++k) {
    __builtin_prefetch(counts + cell[k + kAhead], 1);
    int32_t& held = counts[cell[k]];
    held += held != 0x7fffffff;
  }
}

// Moves the cells and times of the events inside to the front; returns how many they are.
static int64_t select_inside(const EventColumns& events, int64_t count, int64_t* cell, int64_t* t) {
  int64_t kept = 0;
  with_type(events.t_type, events.t, 0, [&](auto column) {
    for (int64_t k = 0; k < count; ++k) {
      const int64_t own = cell[k], time = (int64_t)column[k];
      cell[kept] = own;
      t[kept] = time;
      kept += own >= 0;
    }
  });
  return kept;
}

// Adds a packet, leaving out events outside the sensor; returns how many those are.
static int64_t add_events(EventPacket packet, EventPlanes planes) {
  int64_t x[kLongBlock], y[kLongBlock], t[kLongBlock] = {}, p[kLongBlock], cell[kLongBlock + kAhead] = {};
  const int64_t plane = planes.height * planes.width, on = (planes.polarities - 1) * plane;
  const PixelMap map{planes.height, planes.width, nullptr, nullptr};
  int64_t dropped = 0;
  for (int64_t event = 0; event < packet.count; event += kLongBlock) {
    int64_t count = packet.count - event < kLongBlock ? packet.count - event : kLongBlock;
    EventColumns events{contiguous(packet.x, event, count, x),
                        contiguous(packet.y, event, count, y),
                        planes.times ? contiguous(packet.t, event, count, t) : t,
                        contiguous(packet.p, event, count, p),
                        packet.x.type,
                        packet.y.type,
                        packet.t.type,
                        packet.p.type};
    int64_t outside = 0;
    for (int64_t k = 0; k < count; k += kBlock) {
      const int64_t size = count - k < kBlock ? count - k : kBlock;
      outside += read_cells(events, map, plane, on, k, size, cell + k).out_of_range;
    }
    if (outside) {
      dropped += outside;
      count = select_inside(events, count, cell, x);
      events.t = x;
      events.t_type = IntType::kInt64;
    }
    if (planes.times) {
      with_type(events.t_type, events.t, 0,
                [&](auto column) __attribute__((always_inline)) { keep_latest(column, cell, count, planes.times); });
    }
    if (planes.counts) count_events(cell, count, planes.counts);
  }
  return dropped;
}
