// Loops of lstm_gates over rows, compiled once per instruction set.
//
// A row is `inner` consecutive elements of the state; the four gate blocks of a row follow each other in `gates`.
// Contiguous tensors have one row per sample (inner = C*H*W), channels_last tensors one per pixel (inner = C), so one
// loop serves both. [begin, end) counts elements of the state and may start and stop inside a row, which lets threads
// share a single sample.

#include "lstm_gates/math.inl"

template <class G, class S>
static void lstm_gates_loop(const G* __restrict__ gates, const S* __restrict__ c, G* __restrict__ h,
                            S* __restrict__ c_next, LstmGateOrder order, int64_t inner, int64_t begin, int64_t end) {
  using V = typename Arithmetic<G>::Type;
  constexpr int kLanes = Arithmetic<G>::kLanes;
  for (int64_t start = begin; start < end;) {
    const int64_t row = start / inner;
    const int64_t stop = (row + 1) * inner < end ? (row + 1) * inner : end;
    const G* const row_gates =
        gates + 3 * row * inner;  // plus the state's own offset: gate k of element e is at 4*row*inner + ...
    const G* const i = row_gates + order.i * inner;
    const G* const f = row_gates + order.f * inner;
    const G* const g = row_gates + order.g * inner;
    const G* const o = row_gates + order.o * inner;
    V h_value, c_value;
    int64_t e = start;
    for (; e + kLanes <= stop; e += kLanes) {
      lstm_gates_math<V>(load(i + e), load(f + e), load(g + e), load(o + e), load(c + e), h_value, c_value);
      store(h + e, h_value);
      store(c_next + e, c_value);
    }
    if (e < stop) {
      const int64_t count = stop - e;
      lstm_gates_math<V>(load_partial(i + e, count), load_partial(f + e, count), load_partial(g + e, count),
                         load_partial(o + e, count), load_partial(c + e, count), h_value, c_value);
      store_partial(h + e, h_value, count);
      store_partial(c_next + e, c_value, count);
    }
    start = stop;
  }
}

// d_h or d_c_next may be null: a gradient that is zero everywhere.
template <class G, class S>
static void lstm_gates_backward_loop(const G* __restrict__ d_h, const S* __restrict__ d_c_next,
                                     const G* __restrict__ gates, const S* __restrict__ c, G* __restrict__ d_gates,
                                     S* __restrict__ d_c, LstmGateOrder order, int64_t inner, int64_t begin,
                                     int64_t end) {
  using V = typename Arithmetic<G>::Type;
  constexpr int kLanes = Arithmetic<G>::kLanes;
  for (int64_t start = begin; start < end;) {
    const int64_t row = start / inner;
    const int64_t stop = (row + 1) * inner < end ? (row + 1) * inner : end;
    const int64_t row_offset = 3 * row * inner;
    const int64_t i = row_offset + order.i * inner, f = row_offset + order.f * inner;
    const int64_t g = row_offset + order.g * inner, o = row_offset + order.o * inner;
    const V zero = {};
    V d_i, d_f, d_g, d_o, d_cell;
    int64_t e = start;
    for (; e + kLanes <= stop; e += kLanes) {
      lstm_gates_backward_math<V>(load(gates + i + e), load(gates + f + e), load(gates + g + e), load(gates + o + e),
                                  load(c + e), d_h ? load(d_h + e) : zero, d_c_next ? load(d_c_next + e) : zero, d_i,
                                  d_f, d_g, d_o, d_cell);
      store(d_gates + i + e, d_i);
      store(d_gates + f + e, d_f);
      store(d_gates + g + e, d_g);
      store(d_gates + o + e, d_o);
      store(d_c + e, d_cell);
    }
    if (e < stop) {
      const int64_t count = stop - e;
      lstm_gates_backward_math<V>(load_partial(gates + i + e, count), load_partial(gates + f + e, count),
                                  load_partial(gates + g + e, count), load_partial(gates + o + e, count),
                                  load_partial(c + e, count), d_h ? load_partial(d_h + e, count) : zero,
                                  d_c_next ? load_partial(d_c_next + e, count) : zero, d_i, d_f, d_g, d_o, d_cell);
      store_partial(d_gates + i + e, d_i, count);
      store_partial(d_gates + f + e, d_f, count);
      store_partial(d_gates + g + e, d_g, count);
      store_partial(d_gates + o + e, d_o, count);
      store_partial(d_c + e, d_cell, count);
    }
    start = stop;
  }
}
