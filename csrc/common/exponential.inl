// The exponential function of what is not positive. Included by loops.inl files inside each instruction set's
// namespace; includes nothing itself.

// e^-q for q >= 0; 0 where that is no normal number any more.
EVKERNELS_INLINE VecF exp_negative(VecF q) {
  const VecF x = select(q < 87.0f, -q, splat(-87.0f));
  const VecF shifted = multiply_add(x, 1.44269504f, 12582912.0f), n = shifted - 12582912.0f;
  const VecF r = multiply_add(n, 2.12194440e-4f, multiply_add(n, -0.693359375f, x));
  VecF p = multiply_add(r, 1.9841270e-4f, 1.3888889e-3f);
  p = multiply_add(p, r, 8.3333333e-3f);
  p = multiply_add(p, r, 4.1666667e-2f);
  p = multiply_add(p, r, 1.6666667e-1f);
  p = multiply_add(p, r, 0.5f);
  const VecF scale = (VecF)(((VecU)shifted << 23) + 0x3f800000);  // 2^n
  const VecF value = scale * multiply_add(p, r * r, r + 1.0f);
  return select(q < 87.0f, value, select(q >= 87.0f, VecF{}, q));
}
EVKERNELS_INLINE double exp_negative(double q) { return __builtin_exp(-q); }
