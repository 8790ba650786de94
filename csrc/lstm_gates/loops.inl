// Loops of lstm_gates, compiled once per instruction set. Rows and ranges: common/rows.inl.

#include "common/gate_math.inl"
#include "common/rows.inl"
#include "lstm_gates/math.inl"

template <class G, class S>
static void lstm_gates_loop(const G* __restrict__ gates, const S* __restrict__ c, G* __restrict__ h,
                            S* __restrict__ c_next, LstmGateOrder order, int64_t inner, int64_t begin, int64_t end) {
  constexpr int kLanes = Arithmetic<G>::kLanes;
  for_each_vector<kLanes, GateVectors<G>>(inner, begin, end, [&](auto at, int64_t row, int64_t e) EVKERNELS_LOOP_BODY {
    using V = typename decltype(at)::template Value<G>;
    const G* const first = gates + 3 * row * inner + e;  // block 0 of a row of four
    V h_value, c_value;
    lstm_gates_math<Precise<G, S>>(at.read(first + order.i * inner), at.read(first + order.f * inner),
                                   at.read(first + order.g * inner), at.read(first + order.o * inner), at.read(c + e),
                                   h_value, c_value);
    at.write(h + e, h_value);
    at.write(c_next + e, c_value);
  });
}

// d_h or d_c_next may be null: a gradient that is zero everywhere.
template <class G, class S>
static void lstm_gates_backward_loop(const G* __restrict__ d_h, const S* __restrict__ d_c_next,
                                     const G* __restrict__ gates, const S* __restrict__ c, G* __restrict__ d_gates,
                                     S* __restrict__ d_c, LstmGateOrder order, int64_t inner, int64_t begin,
                                     int64_t end) {
  constexpr int kLanes = Arithmetic<G>::kLanes;
  for_each_vector<kLanes, GateVectors<G>>(inner, begin, end, [&](auto at, int64_t row, int64_t e) EVKERNELS_LOOP_BODY {
    using V = typename decltype(at)::template Value<G>;
    const int64_t first = 3 * row * inner + e;
    const int64_t i = first + order.i * inner, f = first + order.f * inner;
    const int64_t g = first + order.g * inner, o = first + order.o * inner;
    const V zero = {};
    V d_i, d_f, d_g, d_o, d_cell;
    lstm_gates_backward_math<Precise<G, S>>(at.read(gates + i), at.read(gates + f), at.read(gates + g),
                                            at.read(gates + o), at.read(c + e), d_h ? at.read(d_h + e) : zero,
                                            d_c_next ? at.read(d_c_next + e) : zero, d_i, d_f, d_g, d_o, d_cell);
    at.write(d_gates + i, d_i);
    at.write(d_gates + f, d_f);
    at.write(d_gates + g, d_g);
    at.write(d_gates + o, d_o);
    at.write(d_c + e, d_cell);
  });
}
