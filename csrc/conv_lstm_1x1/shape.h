// Sizes and tensors of one 1x1 ConvLSTM sequence; plain numbers and pointers, for host and loops alike.
#pragma once

#include <cstdint>

#include "lstm_gates/order.h"

struct ConvLstmShape {
  int64_t steps, batch, inputs, channels;
  int64_t pixels;  // of a frame
  bool channels_last;
  int64_t kept;  // channels whose gates are kept for the gradient, the first ones: a multiple of 16
  evkernels::LstmGateOrder order;
};

template <class T, class S>
struct ConvLstmForward {
  const T *x, *h;
  const S* c;
  const bool* reset;  // may be null
  T* output;
  S* c_last;
  T* gates;  // of the first s.kept channels; may be null
  S* cells;  // may be null
};

template <class T, class S>
struct ConvLstmBackward {
  const T* d_output;  // may be null: zero
  const S* d_c_last;  // may be null: zero
  const T *x, *h, *output;
  const bool* reset;  // may be null
  const T* gates;     // of the first s.kept channels; those of the others are computed again
  const S* cells;
  T *d_x, *d_h;  // d_x may be null
  S* d_c;
  bool needs_weight;
};
