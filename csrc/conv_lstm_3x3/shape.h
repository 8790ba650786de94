// Sizes and tensors of one 3x3 ConvLSTM sequence; plain numbers and pointers, for host and loops alike.
#pragma once

#include "common/activation.h"
#include "conv_lstm_3x3/maps.h"
#include "lstm_gates/order.h"

struct ConvLstm3x3Shape {
  int64_t steps, inputs, channels;
  Maps maps;
  bool channels_last;
  evkernels::LstmGateOrder order;

  WinogradShape convolution() const { return {maps, {inputs, channels}, channels, 4}; }
};

template <class T, class S, class R>
struct ConvLstm3x3Step {
  const R *x, *h;  // maps of [channels rounded up to whole vectors]
  R* h_next;       // maps likewise
  R* cell;         // maps likewise
  const R* bias;   // [vectors of channels, i f g o, lanes]
  // Pre-activations [N, H, W, 4*C] in the weight's order, and c before the step [N, H, W, C]; both null or none.
  T* gates;
  S* cells;
};

// What follows a convolution's sums, activation(sums + bias + residual), and where the results go: the first `split`
// channels, whole vectors of them, to a tensor of their own, which has no residual; or all, times a projection's
// weights and added up over the channels, to one map.
template <class T, class R>
struct ConvolutionEnd {
  const R* bias;      // [channels rounded up to whole vectors]
  const T* residual;  // [N, H, W, C - split], may be null
  Activation activation;
  int64_t split;
  T *first, *rest;      // [N, H, W, split] and [N, H, W, C - split]
  const R* projection;  // [channels rounded up to whole vectors], may be null
  R* projected;         // [N, H, W]
};
