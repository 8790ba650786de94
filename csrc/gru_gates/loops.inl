// Loops of gru_gates, gru_reset and gru_update, compiled once per instruction set. Rows and ranges: common/rows.inl.

#include "common/gate_math.inl"
#include "common/rows.inl"
#include "gru_gates/math.inl"

template <class G, class S>
static void gru_gates_loop(const G* __restrict__ x_gates, const G* __restrict__ h_gates, const S* __restrict__ h,
                           S* __restrict__ h_next, GruGateOrder order, int64_t inner, int64_t begin, int64_t end) {
  constexpr int kLanes = Arithmetic<G>::kLanes;
  for_each_vector<kLanes, GateVectors<G>>(inner, begin, end, [&](auto at, int64_t row, int64_t e) EVKERNELS_LOOP_BODY {
    const int64_t first = 2 * row * inner + e;  // block 0 of a row of three
    const int64_t z = first + order.z * inner, r = first + order.r * inner, n = first + order.n * inner;
    at.write(h_next + e, gru_gates_math<Precise<G, S>>(at.read(x_gates + z) + at.read(h_gates + z),
                                                       at.read(x_gates + r) + at.read(h_gates + r),
                                                       at.read(x_gates + n) + at.read(h_gates + n), at.read(h + e)));
  });
}

// d_gates is the gradient of x_gates and of h_gates.
template <class G, class S>
static void gru_gates_backward_loop(const S* __restrict__ d_h_next, const G* __restrict__ x_gates,
                                    const G* __restrict__ h_gates, const S* __restrict__ h, G* __restrict__ d_gates,
                                    S* __restrict__ d_h, GruGateOrder order, int64_t inner, int64_t begin,
                                    int64_t end) {
  constexpr int kLanes = Arithmetic<G>::kLanes;
  for_each_vector<kLanes, GateVectors<G>>(inner, begin, end, [&](auto at, int64_t row, int64_t e) EVKERNELS_LOOP_BODY {
    using V = typename decltype(at)::template Value<G>;
    const int64_t first = 2 * row * inner + e;
    const int64_t z = first + order.z * inner, r = first + order.r * inner, n = first + order.n * inner;
    V d_z, d_r, d_n, d_state;
    gru_gates_backward_math<Precise<G, S>>(
        at.read(x_gates + z) + at.read(h_gates + z), at.read(x_gates + r) + at.read(h_gates + r),
        at.read(x_gates + n) + at.read(h_gates + n), at.read(h + e), at.read(d_h_next + e), d_z, d_r, d_n, d_state);
    at.write(d_gates + z, d_z);
    at.write(d_gates + r, d_r);
    at.write(d_gates + n, d_n);
    at.write(d_h + e, d_state);
  });
}

template <class G, class S>
static void gru_reset_loop(const G* __restrict__ zr, const S* __restrict__ h, G* __restrict__ z_active,
                           G* __restrict__ rh, GruResetOrder order, int64_t inner, int64_t begin, int64_t end) {
  constexpr int kLanes = Arithmetic<G>::kLanes;
  for_each_vector<kLanes, GateVectors<G>>(inner, begin, end, [&](auto at, int64_t row, int64_t e) EVKERNELS_LOOP_BODY {
    using V = typename decltype(at)::template Value<G>;
    const G* const first = zr + row * inner + e;
    V z_value, rh_value;
    gru_reset_math<Precise<G, S>>(at.read(first + order.z * inner), at.read(first + order.r * inner), at.read(h + e),
                                  z_value, rh_value);
    at.write(z_active + e, z_value);
    at.write(rh + e, rh_value);
  });
}

// d_z_active or d_rh may be null: a gradient that is zero everywhere.
template <class G, class S>
static void gru_reset_backward_loop(const G* __restrict__ d_z_active, const G* __restrict__ d_rh,
                                    const G* __restrict__ zr, const S* __restrict__ h, G* __restrict__ d_zr,
                                    S* __restrict__ d_h, GruResetOrder order, int64_t inner, int64_t begin,
                                    int64_t end) {
  constexpr int kLanes = Arithmetic<G>::kLanes;
  for_each_vector<kLanes, GateVectors<G>>(inner, begin, end, [&](auto at, int64_t row, int64_t e) EVKERNELS_LOOP_BODY {
    using V = typename decltype(at)::template Value<G>;
    const int64_t first = row * inner + e;
    const int64_t z = first + order.z * inner, r = first + order.r * inner;
    const V zero = {};
    V d_z, d_r, d_state;
    gru_reset_backward_math<Precise<G, S>>(at.read(zr + z), at.read(zr + r), at.read(h + e),
                                           d_z_active ? at.read(d_z_active + e) : zero, d_rh ? at.read(d_rh + e) : zero,
                                           d_z, d_r, d_state);
    at.write(d_zr + z, d_z);
    at.write(d_zr + r, d_r);
    at.write(d_h + e, d_state);
  });
}

template <class G, class S>
static void gru_update_loop(const G* __restrict__ z, const G* __restrict__ n, const S* __restrict__ h,
                            S* __restrict__ h_next, int64_t begin, int64_t end) {
  constexpr int kLanes = Arithmetic<G>::kLanes;
  for_each_vector<kLanes, GateVectors<G>>(end, begin, end, [&](auto at, int64_t, int64_t e) EVKERNELS_LOOP_BODY {
    at.write(h_next + e, gru_update_math<Precise<G, S>>(at.read(z + e), at.read(n + e), at.read(h + e)));
  });
}

template <class G, class S>
static void gru_update_backward_loop(const S* __restrict__ d_h_next, const G* __restrict__ z, const G* __restrict__ n,
                                     const S* __restrict__ h, G* __restrict__ d_z, G* __restrict__ d_n,
                                     S* __restrict__ d_h, int64_t begin, int64_t end) {
  constexpr int kLanes = Arithmetic<G>::kLanes;
  for_each_vector<kLanes, GateVectors<G>>(end, begin, end, [&](auto at, int64_t, int64_t e) EVKERNELS_LOOP_BODY {
    using V = typename decltype(at)::template Value<G>;
    V z_value, n_value, h_value;
    gru_update_backward_math<Precise<G, S>>(at.read(z + e), at.read(n + e), at.read(h + e), at.read(d_h_next + e),
                                            z_value, n_value, h_value);
    at.write(d_z + e, z_value);
    at.write(d_n + e, n_value);
    at.write(d_h + e, h_value);
  });
}
