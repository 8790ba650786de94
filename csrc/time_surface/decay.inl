// What is left of events after their age. Part of a loop file, see foreach_isa.h.

// e^x for x <= 0, down to the smallest denormal number and to zero. What gives zero is left out of the computation,
// which would pass through denormal numbers: processors take hundreds of cycles for them, and cells without events are
// many.
EVKERNELS_INLINE VecF exp_of_negative(VecF x) {
  const VecI is_zero = x < -104.0f;
  x = select(is_zero, splat(0.0f), x);
  // x = n * ln2 + r with |r| <= ln2 / 2; adding 1.5 * 2^23 rounds to the integer n and leaves it in the low bits.
  const VecF shifted = multiply_add(x, 1.44269504f, 12582912.0f);
  const VecF n = shifted - 12582912.0f;
  const VecF r = multiply_add(n, 2.12194440e-4f, multiply_add(n, -0.693359375f, x));
  VecF q = multiply_add(r, 1.9841270e-4f, 1.3888889e-3f);
  q = multiply_add(q, r, 8.3333333e-3f);
  q = multiply_add(q, r, 4.1666667e-2f);
  q = multiply_add(q, r, 1.6666667e-1f);
  q = multiply_add(q, r, 0.5f);
  const VecF power_of_r = multiply_add(q, r * r, r) + 1.0f;
  // 2^n in two factors, because 2^-150 is none; the bits of `shifted` are those of 1.5 * 2^23 plus n.
  const VecI power = (VecI)shifted - 0x4b400000;
  const VecI half = power >> 1;
  return select(is_zero, splat(0.0f), power_of_r * (VecF)((half + 127) << 23) * (VecF)((power - half + 127) << 23));
}

// Minus ages to what is left after them, in place; those of -infinity leave nothing.
static void decay_cells(float* cells, int64_t count, float tau, bool linear) {
  for (int64_t k = 0; k < count; k += EVKERNELS_LANES) {
    const int64_t lanes = count - k < EVKERNELS_LANES ? count - k : EVKERNELS_LANES;
    const bool is_full = lanes == EVKERNELS_LANES;
    const VecF x = (is_full ? load(cells + k) : load_partial(cells + k, lanes)) / tau;
    const VecF rest = x + 1.0f;
    const VecF left = linear ? select(rest > 0.0f, rest, splat(0.0f)) : exp_of_negative(x);
    if (is_full) {
      store(cells + k, left);
    } else {
      store_partial(cells + k, left, lanes);
    }
  }
}
