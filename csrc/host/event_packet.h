// A packet of events as a camera's library hands it over: columns, or the fields of an array of structures, of any
// integer type. No headers of Python or torch.
#pragma once

#include "common/event_columns.h"

namespace evkernels {

struct PacketColumn {
  const char* data;
  int64_t stride;  // Bytes from one event to the next: any number, and elements need not be aligned.
  IntType type;
};

struct EventPacket {
  PacketColumn x, y, t, p;
  int64_t count;
};

// The images that events are added to; a null pointer means that this one is not kept.
struct EventPlanes {
  int64_t height, width, polarities;
  int64_t* times;   // [polarities, height, width]
  int32_t* counts;  // [polarities, height, width]
};

}  // namespace evkernels
