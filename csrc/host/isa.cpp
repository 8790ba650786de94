// The module's own copy of the choice of an instruction set, as an object file with a name of its own.

#include "common/isa.cpp"
