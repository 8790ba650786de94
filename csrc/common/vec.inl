// Vectors of EVKERNELS_LANES floats for one instruction set: load, store, exp, sigmoid, tanh. Included inside a
// namespace by foreach_isa.h, once per instruction set; includes nothing itself.
//
// Arithmetic types: VecF for float, BFloat16 and Half data, plain double for double data (a scalar path: it is there so
// that gradient checks in float64 run the code they check). Formulas in math.inl files take either.

typedef float VecF __attribute__((vector_size(EVKERNELS_LANES * 4)));
typedef int32_t VecI __attribute__((vector_size(EVKERNELS_LANES * 4)));
// Exponents are put together modulo 2^32: lanes whose value is discarded (NaN) may wrap.
typedef uint32_t VecU __attribute__((vector_size(EVKERNELS_LANES * 4)));
typedef uint16_t VecU16 __attribute__((vector_size(EVKERNELS_LANES * 2)));

template <class T>
struct Arithmetic {
  using Type = VecF;
  static constexpr int kLanes = EVKERNELS_LANES;
};
template <>
struct Arithmetic<double> {
  using Type = double;
  static constexpr int kLanes = 1;
};

EVKERNELS_INLINE VecF load(const float* p) {
  VecF v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
EVKERNELS_INLINE void store(float* p, VecF v) { __builtin_memcpy(p, &v, sizeof v); }

EVKERNELS_INLINE double load(const double* p) { return *p; }
EVKERNELS_INLINE void store(double* p, double v) { *p = v; }

EVKERNELS_INLINE VecF load(const BFloat16* p) {
  VecU16 u;
  __builtin_memcpy(&u, p, sizeof u);
  return (VecF)(__builtin_convertvector(u, VecI) << 16);
}
// Rounds to nearest even; a NaN keeps its sign and becomes quiet instead of rounding up to infinity.
EVKERNELS_INLINE void store(BFloat16* p, VecF v) {
  const VecU bits = (VecU)v;
  const VecU rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const VecU16 u = __builtin_convertvector((v != v ? bits | 0x400000 : rounded) >> 16, VecU16);
  __builtin_memcpy(p, &u, sizeof u);
}

#if defined(__x86_64__) && EVKERNELS_LANES == 16
// For the masked forms of instructions, whose masks cost nothing: g++ 12 warns of its own header's others.
constexpr __mmask16 kAllLanes = 0xffff;

// 2^(k / 32) for k = 0 to 31.
alignas(64) constexpr float kPowers[32] = {
    1.0f,        1.02189720f, 1.04427373f, 1.06714046f, 1.09050775f, 1.11438680f, 1.13878858f, 1.16372490f,
    1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
    1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.57598090f, 1.61049032f, 1.64575553f,
    1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.83400810f, 1.87416768f, 1.91520655f, 1.95714414f};
// 2^f of the fraction f of a multiple of 1/32 that adding 1.5 * 2^18 has left in the low bits.
EVKERNELS_INLINE VecF fractional_power_of_two(VecF shifted) {
  return (VecF)_mm512_permutex2var_ps((__m512)load(kPowers), (__m512i)shifted, (__m512)load(kPowers + 16));
}

EVKERNELS_INLINE VecF load(const Half* p) {
  return (VecF)_mm512_maskz_cvtph_ps(kAllLanes, _mm256_loadu_si256((const __m256i*)p));
}
EVKERNELS_INLINE void store(Half* p, VecF v) {
  _mm256_storeu_si256((__m256i*)p,
                      _mm512_maskz_cvtps_ph(kAllLanes, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__x86_64__) && EVKERNELS_LANES == 8
EVKERNELS_INLINE VecF load(const Half* p) { return (VecF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
EVKERNELS_INLINE void store(Half* p, VecF v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
EVKERNELS_INLINE VecF load(const Half* p) {
  VecF v;
  for (int k = 0; k < EVKERNELS_LANES; ++k) v[k] = to_float(p[k]);
  return v;
}
EVKERNELS_INLINE void store(Half* p, VecF v) {
  for (int k = 0; k < EVKERNELS_LANES; ++k) p[k] = from_float<Half>(v[k]);
}
#endif

// The first `count` elements of a vector; the others read as zero and are not stored. For the end of a row.
template <class T>
EVKERNELS_INLINE typename Arithmetic<T>::Type load_partial(const T* p, int64_t count) {
  T buffer[Arithmetic<T>::kLanes] = {};
  for (int64_t k = 0; k < count; ++k) buffer[k] = p[k];
  return load(buffer);
}
template <class T>
EVKERNELS_INLINE void store_partial(T* p, typename Arithmetic<T>::Type v, int64_t count) {
  T buffer[Arithmetic<T>::kLanes];
  store(buffer, v);
  for (int64_t k = 0; k < count; ++k) p[k] = buffer[k];
}

#if defined(__x86_64__) && EVKERNELS_LANES == 16
EVKERNELS_INLINE VecF load_partial(const float* p, int64_t count) {
  return (VecF)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
}
EVKERNELS_INLINE void store_partial(float* p, VecF v, int64_t count) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)v);
}
#elif defined(__x86_64__) && EVKERNELS_LANES == 8
EVKERNELS_INLINE __m256i first_lanes(int64_t count) {
  const VecI lane = {0, 1, 2, 3, 4, 5, 6, 7};
  return (__m256i)(lane < (int32_t)count);
}
EVKERNELS_INLINE VecF load_partial(const float* p, int64_t count) {
  return (VecF)_mm256_maskload_ps(p, first_lanes(count));
}
EVKERNELS_INLINE void store_partial(float* p, VecF v, int64_t count) {
  _mm256_maskstore_ps(p, first_lanes(count), (__m256)v);
}
#endif

EVKERNELS_INLINE VecF splat(float x) {
  const VecF zero = {};
  return zero + x;
}

// a * b + c, fused wherever the instruction set can. Left to the compiler, `a * b + c` is fused in one copy of the code
// and not in another (whole vectors, ends of rows), so that bits would depend on where a thread's share ends.
#if defined(__x86_64__) && EVKERNELS_LANES == 16
EVKERNELS_INLINE VecF multiply_add(VecF a, VecF b, VecF c) { return (VecF)_mm512_fmadd_ps(a, b, c); }
#elif defined(__x86_64__) && EVKERNELS_LANES == 8
EVKERNELS_INLINE VecF multiply_add(VecF a, VecF b, VecF c) { return (VecF)_mm256_fmadd_ps(a, b, c); }
#elif defined(__aarch64__)
EVKERNELS_INLINE VecF multiply_add(VecF a, VecF b, VecF c) {
  return (VecF)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#else
EVKERNELS_INLINE VecF multiply_add(VecF a, VecF b, VecF c) { return a * b + c; }
#endif
EVKERNELS_INLINE VecF multiply_add(VecF a, VecF b, float c) { return multiply_add(a, b, splat(c)); }
EVKERNELS_INLINE VecF multiply_add(VecF a, float b, VecF c) { return multiply_add(a, splat(b), c); }
EVKERNELS_INLINE VecF multiply_add(VecF a, float b, float c) { return multiply_add(a, splat(b), splat(c)); }
#if defined(__x86_64__) && EVKERNELS_LANES == 4
EVKERNELS_INLINE double multiply_add(double a, double b, double c) { return a * b + c; }
#else
EVKERNELS_INLINE double multiply_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
#endif

EVKERNELS_INLINE VecF select(VecI mask, VecF a, VecF b) { return mask ? a : b; }
EVKERNELS_INLINE double sigmoid(double x) { return 1.0 / (1.0 + __builtin_exp(-x)); }
EVKERNELS_INLINE double tanh(double x) { return __builtin_tanh(x); }
