// What the kernels of event_histogram are told about its output. No torch headers.
#pragma once

#include "common/event_columns.h"

struct HistogramShape {
  int64_t bins, height, width;  // each below 2^31
  int32_t cutoff;               // counters stop here, at least 1
};
