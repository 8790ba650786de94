// Loops of conv_gru_3x3, compiled once per instruction set: the two convolutions of one step of all maps, the first
// with the reset and the second with the update as its epilogue. The convolution is conv_lstm_3x3/winograd.inl.

#include "common/gate_math.inl"
#include "conv_lstm_3x3/maps.inl"
#include "conv_lstm_3x3/winograd.inl"
#include "gru_gates/math.inl"

// Panels [begin, end) of the gates of one convolution, side by side.
template <class T, class R>
static void conv_gru_3x3_pack(const ConvGru3x3Gate<T>* gates, R* packed, R* packed_bias, const WinogradShape& s,
                              int64_t begin, int64_t end) {
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  WinogradWeight<T> rows = {{}, (s.inputs[0] + s.inputs[1]) * 9, 9, false};
  for (int gate = 0; gate < s.gates; ++gate) rows.gates[gate] = gates[gate].weight;
  winograd_pack<T>(rows, packed, s, begin, end);
  if (begin != 0) return;
  for (int64_t c = 0; c < round_up(s.channels, kLanes); ++c) {
    for (int gate = 0; gate < s.gates; ++gate) {
      const bool real = c < s.channels && gates[gate].bias;
      packed_bias[(c / kLanes * s.gates + gate) * kLanes + c % kLanes] = real ? to_float(gates[gate].bias[c]) : 0;
    }
  }
}

// Blocks [begin, end) of z and r * h.
template <class T, class R>
static void conv_gru_3x3_reset(const ConvGru3x3Step<T, R>& d, const R* packed, R* buffer, const ConvGru3x3Shape& s,
                               int64_t begin, int64_t end) {
  using V = typename Arithmetic<T>::Type;
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  const int64_t stride = round_up(s.channels, kLanes);
  const WinogradInput<R> inputs[2] = {{d.x, s.inputs, round_up(s.inputs, kLanes)}, {d.h, s.channels, stride}};
  winograd_convolve<2>(inputs, packed, buffer, s.reset_convolution(), begin, end,
                       [&](const SquarePixels& pixels, int64_t unit, V(&sums)[4][2]) EVKERNELS_LOOP_BODY {
                         const R* const bias = d.bias_zr + unit * 2 * kLanes;
                         const int64_t first = unit * kLanes;
                         const SquareOf<V> z = gate_of(sums, 0) + load(bias),
                                           r = gate_of(sums, 1) + load(bias + kLanes);
                         SquareOf<V> z_active, rh;
                         gru_reset_math<T>(z, r, load_square(d.h + first, stride, pixels), z_active, rh);
                         for (int k = 0; k < 4; ++k) {
                           if (!pixels.inside[k]) continue;
                           store(d.h_next + pixels.pixel[k] * stride + first, z_active.v[k]);
                           store(d.rh + pixels.pixel[k] * stride + first, rh.v[k]);
                           if (!d.zr) continue;
                           T* const kept = d.zr + pixels.pixel[k] * 2 * s.channels + first;
                           store_columns(kept, z.v[k], s.channels - first);
                           store_columns(kept + s.channels, r.v[k], s.channels - first);
                         }
                       });
}

// Blocks [begin, end) of the new h.
template <class S, class T, class R>
static void conv_gru_3x3_update(const ConvGru3x3Step<T, R>& d, const R* packed, R* buffer, const ConvGru3x3Shape& s,
                                int64_t begin, int64_t end) {
  using V = typename Arithmetic<T>::Type;
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  const int64_t stride = round_up(s.channels, kLanes);
  const WinogradInput<R> inputs[2] = {{d.x, s.inputs, round_up(s.inputs, kLanes)}, {d.rh, s.channels, stride}};
  winograd_convolve<1>(inputs, packed, buffer, s.candidate_convolution(), begin, end,
                       [&](const SquarePixels& pixels, int64_t unit, V(&sums)[4][1]) EVKERNELS_LOOP_BODY {
                         const int64_t first = unit * kLanes;
                         const SquareOf<V> n = gate_of(sums, 0) + load(d.bias_n + first);
                         const SquareOf<V> z = load_square(d.h_next + first, stride, pixels);
                         const SquareOf<V> h = gru_update_math<T>(z, n, load_square(d.h + first, stride, pixels));
                         for (int k = 0; k < 4; ++k) {
                           if (!pixels.inside[k]) continue;
                           store(d.h_next + pixels.pixel[k] * stride + first, rounded<S>(h.v[k]));
                           if (!d.n) continue;
                           store_columns(d.n + pixels.pixel[k] * s.channels + first, n.v[k], s.channels - first);
                         }
                       });
}
