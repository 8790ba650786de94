// EventAccumulator of evkernels._host: images of a stream of events that one thread adds to and others look at.
#pragma once

#include <pybind11/pybind11.h>

namespace evkernels {

void bind_event_accumulator(pybind11::module_& m);

}  // namespace evkernels
