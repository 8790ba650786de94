// Sizes and tensors of one 3x3 ConvGRU sequence; plain numbers and pointers, for host and loops alike.
#pragma once

#include "conv_lstm_3x3/maps.h"

struct ConvGru3x3Shape {
  int64_t steps, inputs, channels;
  Maps maps;
  bool channels_last;

  WinogradShape reset_convolution() const { return {maps, {inputs, channels}, channels, 2}; }
  WinogradShape candidate_convolution() const { return {maps, {inputs, channels}, channels, 1}; }
};

// Maps of [channels rounded up to whole vectors]; biases [vectors of channels, gates, lanes].
template <class T, class R>
struct ConvGru3x3Step {
  const R *x, *h;
  R *rh, *h_next;  // z is in h_next until the update
  const R *bias_zr, *bias_n;
  T *zr, *n;  // pre-activations [N, H, W, 2*C] and [N, H, W, C], may be null
};

template <class T>
struct ConvGru3x3Gate {
  const T *weight, *bias;  // bias may be null
};
