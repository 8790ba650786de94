// From the sums that the loops of separable_norm_conv2d leave to statistics, and on to what the norms multiply and add.
// All in double; a few numbers per channel, which one thread works out.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace evkernels {

// Count, mean and sum of squared deviations of some numbers.
struct Moments {
  double count = 0, mean = 0, deviations = 0;

  // Chan et al. 1979, eq. 2.1.
  void add(const Moments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, distance = other.mean - mean;
    deviations += other.deviations + distance * distance * count * other.count / total;
    mean += distance * other.count / total;
    count = total;
  }
};

// One norm: batch norm if groups is 0, group norm otherwise.
struct Norm {
  int64_t samples, channels, groups;
  double eps;

  int64_t rows() const { return groups == 0 ? 1 : samples; }
  int64_t columns() const { return groups == 0 ? channels : groups; }
  // Which mean and variance a channel of a sample has.
  int64_t index(int64_t sample, int64_t channel) const {
    return groups == 0 ? channel : sample * groups + channel / (channels / groups);
  }
};

// From the loops' [unit][reference, sum, sum of squares][channels] to the moments of each index; pixels(unit) are the
// numbers behind a sum.
template <class F>
std::vector<Moments> moments_of(const Norm& norm, const double* sums, int64_t units, const F& pixels) {
  std::vector<Moments> result(norm.rows() * norm.columns());
  for (int64_t unit = 0; unit < norm.samples * units; ++unit) {
    const double* const at = sums + unit * 3 * norm.channels;
    const double count = pixels(unit);
    for (int64_t c = 0; c < norm.channels; ++c) {
      const double shift = at[norm.channels + c] / count;
      const double deviations = at[2 * norm.channels + c] - at[norm.channels + c] * shift;
      result[norm.index(unit / units, c)].add({count, at[c] + shift, deviations > 0 ? deviations : 0});
    }
  }
  return result;
}

// Arrays [samples][pitch] that the loops read, zero behind the channels.
template <class R>
struct Rows {
  int64_t pitch;
  std::vector<R> values[4];

  Rows(int64_t samples, int64_t channels) : pitch((channels + 31) / 16 * 16) {
    for (auto& value : values) value.assign(samples * pitch, R{});
  }
  R& operator()(int array, int64_t sample, int64_t channel) { return values[array][sample * pitch + channel]; }
};

// scale and shift of a norm with weight and bias, or of the normalisation alone where these are null.
template <class R, class T>
Rows<R> affine_of(const Norm& norm, const double* mean, const double* variance, const T* weight, const T* bias) {
  Rows<R> result(norm.samples, norm.channels);
  for (int64_t n = 0; n < norm.samples; ++n) {
    for (int64_t c = 0; c < norm.channels; ++c) {
      const int64_t k = norm.index(n, c);
      const double scale = (weight ? to_float(weight[c]) : 1.0) / std::sqrt(variance[k] + norm.eps);
      result(0, n, c) = static_cast<R>(scale);
      result(1, n, c) = static_cast<R>((bias ? to_float(bias[c]) : 0.0) - mean[k] * scale);
    }
  }
  return result;
}

// The norm's gradient as k1, k2, k3 and mean, and those of its weight and bias, from the loops' [unit][sum, product
// sum][channels]. `of_normal`: they belong to the normalised input, whose mean is 0, not to the input.
template <class R, class T>
Rows<R> gradient_of_norm(const Norm& norm, const double* mean, const double* variance, const T* weight,
                         const double* sums, int64_t units, double pixels, bool of_normal, T* d_weight, T* d_bias) {
  std::vector<double> d_scale(norm.channels), d_shift(norm.channels);
  std::vector<double> average(norm.rows() * norm.columns()), product(average.size());
  for (int64_t unit = 0; unit < norm.samples * units; ++unit) {
    const double* const at = sums + unit * 2 * norm.channels;
    for (int64_t c = 0; c < norm.channels; ++c) {
      const int64_t k = norm.index(unit / units, c);
      d_shift[c] += at[c];
      d_scale[c] += at[norm.channels + c];
      average[k] += at[c] * to_float(weight[c]);
      product[k] += at[norm.channels + c] * to_float(weight[c]);
    }
  }
  const double count = pixels * (norm.groups == 0 ? norm.samples : norm.channels / norm.groups);
  Rows<R> result(norm.samples, norm.channels);
  for (int64_t n = 0; n < norm.samples; ++n) {
    for (int64_t c = 0; c < norm.channels; ++c) {
      const int64_t k = norm.index(n, c);
      const double rstd = 1 / std::sqrt(variance[k] + norm.eps), slope = -rstd * product[k] / count;
      result(0, n, c) = static_cast<R>(to_float(weight[c]) * rstd);
      result(1, n, c) = static_cast<R>(of_normal ? slope : slope * rstd);
      result(2, n, c) = static_cast<R>(-rstd * average[k] / count);
      result(3, n, c) = static_cast<R>(of_normal ? 0 : mean[k]);
    }
  }
  for (int64_t c = 0; c < norm.channels; ++c) {
    d_weight[c] = from_float<T>(static_cast<Compute<T>>(d_scale[c]));
    d_bias[c] = from_float<T>(static_cast<Compute<T>>(d_shift[c]));
  }
  return result;
}

}  // namespace evkernels
