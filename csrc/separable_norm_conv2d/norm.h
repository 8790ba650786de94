// What host and loops of separable_norm_conv2d tell each other.
#pragma once

#include <cstdint>

#include "common/half.h"

namespace evkernels {

// What a norm multiplies and adds per channel; each array holds [samples][pitch] values.
template <class R>
struct Affine {
  const R *scale, *shift;
  int64_t pitch;

  Affine at(int64_t sample, int64_t channel = 0) const {
    const int64_t k = sample * pitch + channel;
    return {scale + k, shift + k, pitch};
  }
};

// The gradient before a norm: k1 * (gradient after it) + k2 * (its input - mean) + k3. Taking the mean out of k3
// instead would lose what it is larger than the deviation.
template <class R>
struct NormGradient {
  const R *k1, *k2, *k3, *mean;
  int64_t pitch;

  NormGradient at(int64_t sample, int64_t channel = 0) const {
    const int64_t k = sample * pitch + channel;
    return {k1 + k, k2 + k, k3 + k, mean + k, pitch};
  }
};

// Where the products of the backward pass find and leave things. The norms are of one sample after the other.
template <class T>
struct NormBackward {
  using R = Compute<T>;
  const T *x, *pre, *d_output;
  const R* panels;                  // of the pointwise weight, see separable_conv2d_pack_backward
  Affine<R> normal, norm;           // the first norm: normalisation alone, and the weight and bias behind it
  Affine<R> output_norm;            // the second norm
  NormGradient<R> output_gradient;  // of the second norm
  T* d_inner;                       // the gradient after the first norm
  R* d_weights;                     // [unit][outputs rounded up][channels rounded up]
  double *sums, *bias_sums;         // [unit][2][C] as in norm_output_sums, [unit][O]
};

}  // namespace evkernels
