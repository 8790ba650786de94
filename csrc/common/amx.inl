// Tiles of AMX for kernels that multiply bfloat16: configuration, load, product, store; float32 as two bfloat16.
// Included by foreach_isa.h inside the namespace amx; includes nothing itself.
//
// A tile has 16 rows of 64 bytes: of a factor on the left 16 rows of 32 values, of one on the right 16 rows of 16 pairs
// of values that stand below one another, of the result 16 by 16 floats. Products are exact and added up in float32;
// subnormal numbers count as zero on both sides.
//
// Assembly instead of the compiler's intrinsics: g++ 12 does not know that loading a configuration or a tile reads
// memory, and moves or drops the stores before it.

constexpr int64_t kTileRows = 16, kTileDepth = 32;
constexpr int64_t kTileSize = kTileRows * kTileDepth;  // values of bfloat16 in a tile

// Tiles are usable while it lives, on the thread that made it.
class Tiles {
 public:
  Tiles() {
    struct {
      uint8_t palette, start_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int k = 0; k < 8; ++k) {
      config.row_bytes[k] = 64;
      config.rows[k] = kTileRows;
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  ~Tiles() { __asm__ volatile("tilerelease"); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <int tile>
EVKERNELS_INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(tile));
}
template <int tile>
EVKERNELS_INLINE void load_tile_rows(const void* from, int64_t row_bytes) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(tile) : "memory");
}
template <int tile>
EVKERNELS_INLINE void store_tile_rows(void* to, int64_t row_bytes) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(tile) : "memory");
}
// sum += left * right, all numbers of tiles.
template <int sum, int left, int right>
EVKERNELS_INLINE void multiply_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(left), "i"(right));
}

// Where a factor's tiles are: two of them side by side or below one another, `second` values apart, and the next ones
// of the sum `step` values on. With two parts, the low ones lie `low` values behind the high ones.
struct TileFactor {
  const BFloat16* first;
  int64_t second, step, low, row_bytes;
};

template <int tile>
EVKERNELS_INLINE void load_tiles(const TileFactor& f, const BFloat16* from) {
  load_tile_rows<tile>(from, f.row_bytes);
  load_tile_rows<tile + 1>(from + f.second, f.row_bytes);
}
template <int left, int right>
EVKERNELS_INLINE void multiply_four_tiles() {
  multiply_tiles<0, left, right>();
  multiply_tiles<1, left, right + 1>();
  multiply_tiles<2, left + 1, right>();
  multiply_tiles<3, left + 1, right + 1>();
}

// Adds the product of `steps` tiles of depth to tiles 0 and 1, the first of `left` by both of `right`, and 2 and 3, the
// second. With two parts (float32 as high + low) it is high * low + high * high + low * high: low * low would be below
// the rounding of float32 sums. Uses all eight tiles. `between` is called after every step, for work on vectors that is
// to overlap with that on tiles.
template <int parts, class Between>
EVKERNELS_INLINE void add_tile_product(const TileFactor& left, const TileFactor& right, int64_t steps,
                                       Between between) {
  const BFloat16 *a = left.first, *b = right.first;
#pragma GCC unroll 1
  for (int64_t k = 0; k < steps; ++k, a += left.step, b += right.step) {
    load_tiles<4>(left, a);
    if constexpr (parts == 2) {
      load_tiles<6>(right, b + right.low);
      multiply_four_tiles<4, 6>();
    }
    load_tiles<6>(right, b);
    multiply_four_tiles<4, 6>();
    if constexpr (parts == 2) {
      load_tiles<4>(left, a + left.low);
      multiply_four_tiles<4, 6>();
    }
    between();
  }
}

typedef struct {
  VecU16 bits;
} VecBFloat16;

// To nearest; a NaN stays one.
EVKERNELS_INLINE VecBFloat16 to_bfloat16(VecF v) { return {(VecU16)_mm512_cvtneps_pbh((__m512)v)}; }
EVKERNELS_INLINE VecF to_float(VecBFloat16 v) { return (VecF)(__builtin_convertvector(v.bits, VecI) << 16); }
EVKERNELS_INLINE void store(BFloat16* p, VecBFloat16 v) { __builtin_memcpy(p, &v.bits, sizeof v.bits); }

// The vector as one part, or as high + low with an error of about 2^-17 of it. What is not finite has no such parts:
// its low one is NaN.
template <int parts>
EVKERNELS_INLINE void store_parts(BFloat16* to, int64_t low, VecF v) {
  const VecBFloat16 high = to_bfloat16(v);
  store(to, high);
  if constexpr (parts == 2) store(to + low, to_bfloat16(v - to_float(high)));
}
