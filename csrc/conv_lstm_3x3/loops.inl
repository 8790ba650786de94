// Loops of conv_lstm_3x3, compiled once per instruction set: one step of all maps, with the gates as the convolution's
// epilogue. The convolution is winograd.inl's.
//
// Against the better layout of eager float32, one thread of a Xeon with AVX-512, ten steps of two samples: C = 64 at
// 45x80 2.1 times as fast, training 1.7; C = 256 at 23x40 1.6. At C = 256 transforming the weights, once per call,
// costs a third to a half of a step. C = 8 behind 16 inputs at 260x346 takes 2.2, training 1.3; with a vector per gate
// it took 1.25. In 16 bits the library's convolution on AMX is faster than this one, which computes in float32: the
// cells do not take it there.
//
// A convolution of its own with residual and ReLU (`python -m benchmarks convolution`), one thread of a Zen 3 against
// the library's and operators in place: 1.03 with 16 channels at 180x240, 1.2 with 32 at 65x87, 1.5 with 64 at 90x160
// and with 128 at 45x80, 1.1 with 256 at 23x30.

#include "common/activations.inl"
#include "common/gate_math.inl"
#include "conv_lstm_3x3/maps.inl"
#include "conv_lstm_3x3/winograd.inl"
#include "conv_lstm_3x3/weight_gradient.inl"
#include "lstm_gates/math.inl"

// Whether two gates share a vector.
template <class R>
static bool is_narrow(int64_t channels) {
  return 2 * channels <= Arithmetic<R>::kLanes;
}

// The stride of the state's maps: whole vectors, or half of one, so that two pixels side by side fill it.
template <class R>
static int64_t state_stride(int64_t channels) {
  return is_narrow<R>(channels) ? Arithmetic<R>::kLanes / 2 : whole_vectors<R>(channels);
}

template <class T, class R>
static void conv_lstm_3x3_pack(const T* weight, const T* bias, R* packed, R* packed_bias, const ConvLstm3x3Shape& s,
                               int64_t begin, int64_t end) {
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  const int places[4] = {s.order.i, s.order.f, s.order.g, s.order.o};
  const int64_t depth = s.inputs + s.channels;
  WinogradWeight<T> rows = {{}, depth * 9, 9, false};
  for (int gate = 0; gate < 4; ++gate) rows.gates[gate] = weight + places[gate] * s.channels * depth * 9;
  winograd_pack<T>(rows, packed, s.convolution(), begin, end);
  for (int64_t lane = begin * kLanes; lane < end * kLanes; ++lane) {
    const int64_t c = is_narrow<R>(s.channels) ? lane % (kLanes / 2) : lane;
    for (int gate = 0; gate < 4; ++gate) {
      const bool real = c < s.channels && bias;
      packed_bias[(lane / kLanes * 4 + gate) * kLanes + lane % kLanes] =
          real ? to_float(bias[places[gate] * s.channels + c]) : 0;
    }
  }
}

// Half of a and the same half of b, from lane `first` on.
template <class V>
EVKERNELS_INLINE V halves(V a, V b, int first) {
  constexpr int kLanes = sizeof(V) / 4;
  VecI from;
#pragma GCC unroll 16
  for (int k = 0; k < kLanes; ++k) from[k] = first + (k < kLanes / 2 ? k : k + kLanes / 2);
  return __builtin_shuffle(a, b, from);
}

// Blocks [begin, end) of one step where two gates share a vector: both pixels of a square's row at once, their channels
// side by side.
template <class T, class S, class R>
static void conv_lstm_3x3_narrow_step(const ConvLstm3x3Step<T, S, R>& d, const R* packed, R* buffer,
                                      const ConvLstm3x3Shape& s, int64_t begin, int64_t end) {
  constexpr int64_t kLanes = Arithmetic<T>::kLanes, kHalf = kLanes / 2;
  const Maps& m = s.maps;
  const WinogradInput<R> inputs[2] = {{d.x, s.inputs, round_up(s.inputs, kLanes)}, {d.h, s.channels, kHalf}};
  const int places[4] = {s.order.i, s.order.f, s.order.g, s.order.o};
  winograd_squares<2>(
      inputs, packed, buffer, s.convolution(), begin, end,
      [&](const SquarePlace& square, int64_t, VecF(&sums)[4][2]) EVKERNELS_LOOP_BODY {
        const int64_t pixels = smaller(2, m.width - square.left), rows = smaller(2, m.height - square.top);
        const auto place = [&](int64_t row) EVKERNELS_LOOP_BODY { return square.pixel(m, row, 0) * kHalf; };
        Interleaved<VecF, 2> pre[4], c, h, c_next;  // of both rows, as far as the map reaches
#pragma GCC unroll 2
        for (int row = 0; row < 2; ++row) {
#pragma GCC unroll 4
          for (int gate = 0; gate < 4; ++gate) {
            const VecF left = sums[2 * row][gate / 2], right = sums[2 * row + 1][gate / 2];
            pre[gate].v[row] = halves(left, right, gate % 2 * kHalf) + (VecF)load(d.bias + gate * kLanes);
          }
          c.v[row] = load(d.cell + place(row < rows ? row : 0));
        }
        lstm_gates_math<T>(pre[0], pre[1], pre[2], pre[3], c, h, c_next);
        for (int64_t row = 0; row < rows; ++row) {
          // Behind the last column is the next row.
          store_columns(d.cell + place(row), rounded<S>(c_next.v[row]), pixels * kHalf);
          store_columns(d.h_next + place(row), rounded<T>(h.v[row]), pixels * kHalf);
          if (!d.gates) continue;
          const int64_t first = (square.sample * m.height + square.top + row) * m.width + square.left;
          for (int64_t pixel = 0; pixel < pixels; ++pixel) {
            const auto of_pixel = [&](VecF both)
                                      EVKERNELS_LOOP_BODY { return pixel ? halves(both, both, kHalf) : both; };
            store_partial(d.cells + (first + pixel) * s.channels, of_pixel(c.v[row]), s.channels);
            for (int gate = 0; gate < 4; ++gate) {
              T* const kept = d.gates + ((first + pixel) * 4 + places[gate]) * s.channels;
              store_partial(kept, of_pixel(pre[gate].v[row]), s.channels);
            }
          }
        }
      });
}

// Blocks [begin, end) of one step.
template <class T, class S, class R>
static void conv_lstm_3x3_step(const ConvLstm3x3Step<T, S, R>& d, const R* packed, R* buffer, const ConvLstm3x3Shape& s,
                               int64_t begin, int64_t end) {
  using V = typename Arithmetic<T>::Type;
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  if constexpr (kLanes > 1) {
    if (is_narrow<R>(s.channels)) return conv_lstm_3x3_narrow_step(d, packed, buffer, s, begin, end);
  }
  const int64_t x_stride = round_up(s.inputs, kLanes), stride = round_up(s.channels, kLanes);
  const WinogradInput<R> inputs[2] = {{d.x, s.inputs, x_stride}, {d.h, s.channels, stride}};
  const int places[4] = {s.order.i, s.order.f, s.order.g, s.order.o};
  winograd_convolve<4>(inputs, packed, buffer, s.convolution(), begin, end,
                       [&](const SquarePixels& pixels, int64_t unit, V(&sums)[4][4]) EVKERNELS_LOOP_BODY {
                         const R* const bias = d.bias + unit * 4 * kLanes;
                         const int64_t first = unit * kLanes;
                         SquareOf<V> pre[4], h, c_next;
#pragma GCC unroll 4
                         for (int gate = 0; gate < 4; ++gate)
                           pre[gate] = gate_of(sums, gate) + load(bias + gate * kLanes);
                         const SquareOf<V> c = load_square(d.cell + first, stride, pixels);
                         lstm_gates_math<T>(pre[0], pre[1], pre[2], pre[3], c, h, c_next);
                         for (int k = 0; k < 4; ++k) {
                           if (!pixels.inside[k]) continue;
                           const int64_t pixel = pixels.pixel[k], place = pixel * stride + first;
                           store(d.cell + place, rounded<S>(c_next.v[k]));
                           store(d.h_next + place, rounded<T>(h.v[k]));
                           if (!d.gates) continue;
                           store_columns(d.cells + pixel * s.channels + first, c.v[k], s.channels - first);
                           T* const kept = d.gates + pixel * 4 * s.channels + first;
#pragma GCC unroll 4
                           for (int gate = 0; gate < 4; ++gate) {
                             store_columns(kept + places[gate] * s.channels, pre[gate].v[k], s.channels - first);
                           }
                         }
                       });
}

// The convolution of a gradient [N, H, W, channels of the output] back to its inputs [N, H, W, s.channels].
template <class T, class R>
static void input_gradient_pack(const T* weight, int64_t columns, R* packed, const WinogradShape& s, int64_t begin,
                                int64_t end) {
  const WinogradWeight<T> rows = {{weight}, 9, columns * 9, true};
  winograd_pack<T>(rows, packed, s, begin, end);
}

// A convolution of its own: the weight [s.channels, s.inputs[0], 3, 3] as it is.
template <class T, class R>
static void convolution_pack(const T* weight, R* packed, const WinogradShape& s, int64_t begin, int64_t end) {
  const WinogradWeight<T> rows = {{weight}, s.inputs[0] * 9, 9, false};
  winograd_pack<T>(rows, packed, s, begin, end);
}

// One copy of all activations: a call for four vectors costs little beside their sums.
template <class V>
static __attribute__((noinline)) void activate_square(Activation activation, SquareOf<V>& values) {
  with_activation(activation, [&](auto kind) EVKERNELS_LOOP_BODY {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) values.v[k] = activate<decltype(kind)::value>(values.v[k]);
  });
}

// A square's first unit comes first, and all of them are one thread's.
template <class V, class T, class R>
static void project_square(const SquareOf<V>& y, const ConvolutionEnd<T, R>& last, const SquarePixels& pixels,
                           int64_t unit) {
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  const V weights = load(last.projection + unit * kLanes);
  for (int k = 0; k < 4; ++k) {
    if (!pixels.inside[k]) continue;
    R lanes[kLanes], sum = 0;
    store(lanes, V(y.v[k] * weights));
    for (const R lane : lanes) sum += lane;
    R& to = last.projected[pixels.pixel[k]];
    to = unit == 0 ? sum : to + sum;
  }
}

template <class T, class R>
static void convolution(const R* maps, const R* packed, const ConvolutionEnd<T, R>& last, R* buffer,
                        const WinogradShape& s, int64_t begin, int64_t end) {
  using V = typename Arithmetic<T>::Type;
  constexpr int64_t kLanes = Arithmetic<T>::kLanes;
  const WinogradInput<R> inputs[2] = {{maps, s.inputs[0], round_up(s.inputs[0], kLanes)}, {maps, 0, 0}};
  winograd_convolve<1>(inputs, packed, buffer, s, begin, end,
                       [&](const SquarePixels& pixels, int64_t unit, V(&sums)[4][1]) EVKERNELS_LOOP_BODY {
                         SquareOf<V> y = gate_of(sums, 0) + load(last.bias + unit * kLanes);
                         const bool is_first = unit * kLanes < last.split;
                         const int64_t c = unit * kLanes - (is_first ? 0 : last.split);
                         const int64_t stride = is_first ? last.split : s.channels - last.split;
                         if (last.residual && !is_first) {
                           for (int k = 0; k < 4; ++k) {
                             y.v[k] += load_columns(last.residual + pixels.pixel[k] * stride + c, stride - c);
                           }
                         }
                         if (last.activation != Activation::kNone) activate_square(last.activation, y);
                         if (last.projection) return project_square(y, last, pixels, unit);
                         T* const output = is_first ? last.first : last.rest;
                         for (int k = 0; k < 4; ++k) {
                           if (!pixels.inside[k]) continue;
                           store_columns(output + pixels.pixel[k] * stride + c, y.v[k], stride - c);
                         }
                       });
}
