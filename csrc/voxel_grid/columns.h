// The events and the grid as the kernels of voxel_grid see them. No torch headers.
#pragma once

#include "common/event_columns.h"

enum class RealType : int32_t { kNone, kFloat32, kFloat64 };

struct VoxelColumns {
  EventColumns events;  // the types of floating columns mean nothing here
  RealType xy_type;     // kNone: x and y are integers
  RealType t_type;      // kNone: t is an integer
  const void* weight;   // [E] of the grid's type, or null
};

struct VoxelShape {
  int64_t bins, height, width;  // each below 2^31
  double fewer, shift;          // the last event of a window is at position bins - fewer - shift
  bool is_hard;                 // one bin per event instead of two
  bool is_clamped;              // positions outside the grid belong to the first and last bin
  bool is_split;                // channels for ON, then channels for OFF
  int32_t zero;                 // the value of polarity 0

#if defined(__CUDACC__)
  __host__ __device__
#endif
      int64_t channels() const {
    return is_split ? 2 * bins : bins;
  }
};
