// The ConvLSTM gate update and its gradient for one element, in any arithmetic type V that has
// sigmoid_for, tanh_for and sigmoid_times_tanh_for, for results that are rounded to T.
// i, f, g, o are pre-activations. Includes nothing: it is compiled inside each instruction set's namespace and in CUDA.
// Sums of products are multiply_add, for the same bits in every copy of the code; 1 - g^2 is (1 - g)(1 + g), which
// loses nothing where g saturates.

template <class T, class V>
EVKERNELS_INLINE void lstm_gates_math(V i, V f, V g, V o, V c, V& h, V& c_next) {
  c_next = multiply_add(sigmoid_for<T>(f), c, sigmoid_times_tanh_for<T>(i, g));
  h = sigmoid_times_tanh_for<T>(o, c_next);
}

// d_c_next is the gradient that arrives at the new cell state from the next step.
template <class T, class V>
EVKERNELS_INLINE void lstm_gates_backward_math(V i, V f, V g, V o, V c, V d_h, V d_c_next, V& d_i, V& d_f, V& d_g,
                                               V& d_o, V& d_c) {
  i = sigmoid_for<T>(i);
  f = sigmoid_for<T>(f);
  g = tanh_for<T>(g);
  o = sigmoid_for<T>(o);
  const V tanh_c = tanh_for<T>(multiply_add(i, g, f * c));
  const V d_cell = multiply_add(d_h * o, (1.0f - tanh_c) * (1.0f + tanh_c), d_c_next);
  d_i = d_cell * g * i * (1.0f - i);
  d_f = d_cell * c * f * (1.0f - f);
  d_g = d_cell * i * ((1.0f - g) * (1.0f + g));
  d_o = d_h * tanh_c * o * (1.0f - o);
  d_c = d_cell * f;
}
