// The two ConvGRU updates and their gradients for one element, in any arithmetic type V that has
// sigmoid_for and tanh_for, for results that are rounded to T.
// Includes nothing: it is compiled inside each instruction set's namespace and in CUDA.
//
// Sums of products are multiply_add, for the same bits in every copy of the code. 1 - n^2 is written (1 - n)(1 + n),
// which loses nothing where n saturates. The blend is not h + z*(n - h), whose difference of infinities would be NaN.

template <class V>
EVKERNELS_INLINE V gru_blend(V z, V n, V h) {
  return multiply_add(z, n, (1.0f - z) * h);
}

// z, r, n: sums of the pre-activations from the input and from the state.
template <class T, class V>
EVKERNELS_INLINE V gru_gates_math(V z, V r, V n, V h) {
  return gru_blend(sigmoid_for<T>(z), tanh_for<T>(multiply_add(sigmoid_for<T>(r), h, n)), h);
}

template <class T, class V>
EVKERNELS_INLINE void gru_gates_backward_math(V z, V r, V n, V h, V d_h_next, V& d_z, V& d_r, V& d_n, V& d_h) {
  z = sigmoid_for<T>(z);
  r = sigmoid_for<T>(r);
  n = tanh_for<T>(multiply_add(r, h, n));
  d_n = d_h_next * z * ((1.0f - n) * (1.0f + n));
  d_z = d_h_next * (n - h) * z * (1.0f - z);
  d_r = d_n * h * r * (1.0f - r);
  d_h = multiply_add(d_n, r, d_h_next * (1.0f - z));
}

// z, r: pre-activations; z_active, rh: results.
template <class T, class V>
EVKERNELS_INLINE void gru_reset_math(V z, V r, V h, V& z_active, V& rh) {
  z_active = sigmoid_for<T>(z);
  rh = sigmoid_for<T>(r) * h;
}

// d_z_active, d_rh: gradients of the results.
template <class T, class V>
EVKERNELS_INLINE void gru_reset_backward_math(V z, V r, V h, V d_z_active, V d_rh, V& d_z, V& d_r, V& d_h) {
  z = sigmoid_for<T>(z);
  r = sigmoid_for<T>(r);
  d_z = d_z_active * z * (1.0f - z);
  d_r = d_rh * h * r * (1.0f - r);
  d_h = d_rh * r;
}

// z is the activated gate, n the pre-activation of the candidate.
template <class T, class V>
EVKERNELS_INLINE V gru_update_math(V z, V n, V h) {
  return gru_blend(z, tanh_for<T>(n), h);
}

template <class T, class V>
EVKERNELS_INLINE void gru_update_backward_math(V z, V n, V h, V d_h_next, V& d_z, V& d_n, V& d_h) {
  n = tanh_for<T>(n);
  d_z = d_h_next * (n - h);
  d_n = d_h_next * z * ((1.0f - n) * (1.0f + n));
  d_h = d_h_next * (1.0f - z);
}
