#pragma once
#include <cstdint>
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
static inline __attribute__((always_inline)) float to_float(Half h) {
  return (float)__builtin_bit_cast(_Float16, h.bits);
}
template <class T>
static inline __attribute__((always_inline)) T from_float(float f) {
  _Float16 h = (_Float16)f;
  T r;
  r.bits = __builtin_bit_cast(uint16_t, h);
  return r;
}
