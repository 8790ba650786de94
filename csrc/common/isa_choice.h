// Names and change of the instruction set, for what the two modules offer to Python. No torch headers.
#pragma once

#include <string>

#include "common/isa.h"

namespace evkernels {

const char* isa_name(Isa isa);
Isa best_isa();

// Takes a set's name or "best" and returns the name of the one before. Throws std::runtime_error for any other name and
// for sets that this processor lacks.
std::string set_isa(const std::string& name);

}  // namespace evkernels
