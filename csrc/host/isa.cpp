// The module's own copy of the choice of an instruction set: as an object file of its own, because both modules' objects
// of one source would have the same name.
#include "common/isa.cpp"
