// x86 with AVX-512 F, BW, DQ and VL: 16 floats, and a lookup of 16 entries in one instruction.
#include "kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>

namespace tq::cpu {
namespace {

struct Vec {
  static constexpr int width = 16;
  static constexpr int few_rows = 8;
  __m512 v;

  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load_bf16(const uint16_t* p) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16))};
  }
  static Vec load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static Vec add(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
  static Vec sub(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
  static Vec mul(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
  static Vec div(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Vec where_zero(Vec c, Vec a, Vec b) {
    const __mmask16 zero = _mm512_cmp_ps_mask(c.v, _mm512_setzero_ps(), _CMP_EQ_OQ);
    return {_mm512_mask_blend_ps(zero, b.v, a.v)};
  }
  static Vec where_less(Vec a, Vec b, Vec x, Vec y) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
  }
  static Vec power_of_two(Vec p, Vec t) {
    const __m512i n = _mm512_slli_epi32(_mm512_castps_si512(t.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p.v), n))};
  }
  static float reduce_max(Vec a) { return _mm512_reduce_max_ps(a.v); }
  static float reduce_add(Vec a) { return _mm512_reduce_add_ps(a.v); }
  static void reduce_add4(Vec a, Vec b, Vec c, Vec d, float* sums) {
    const auto halves = [](Vec x) {
      return _mm256_add_ps(_mm512_castps512_ps256(x.v), _mm512_extractf32x8_ps(x.v, 1));
    };
    const __m256 x =
        _mm256_hadd_ps(_mm256_hadd_ps(halves(a), halves(b)), _mm256_hadd_ps(halves(c), halves(d)));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
  }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store_bf16(uint16_t* p) const {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  }
  void store_f16(uint16_t* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

// Four steps of a binary search: n is how many are below so far, and the next to compare with is
// boundary n + 7, then n + 3, n + 1 and n.
struct Boundaries {
  __m512 plus_7, plus_3, plus_1, plus_0;

  explicit Boundaries(const float* b)
      : plus_7(_mm512_set1_ps(b[7])),
        plus_3(_mm512_maskz_loadu_ps(0x0fff, b + 3)),
        plus_1(_mm512_maskz_loadu_ps(0x3fff, b + 1)),
        plus_0(_mm512_maskz_loadu_ps(0x7fff, b)) {}
  template <int step>
  static __m512i add_above(__m512i n, Vec x, __m512 b) {
    const __mmask16 above = _mm512_cmp_ps_mask(x.v, _mm512_permutexvar_ps(n, b), _CMP_GT_OQ);
    return _mm512_mask_add_epi32(n, above, n, _mm512_set1_epi32(step));
  }
  void below(Vec x, int32_t* index) const {
    __m512i n = add_above<8>(_mm512_setzero_si512(), x, plus_7);
    n = add_above<4>(n, x, plus_3);
    n = add_above<2>(n, x, plus_1);
    _mm512_storeu_si512(index, add_above<1>(n, x, plus_0));
  }
};

struct Bytes {
  static constexpr int width = 64;
  __m512i v;

  static Bytes load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
  static Bytes interleave_low(Bytes a, Bytes b) { return {_mm512_unpacklo_epi8(a.v, b.v)}; }
  static Bytes interleave_high(Bytes a, Bytes b) { return {_mm512_unpackhi_epi8(a.v, b.v)}; }
  void store(uint8_t* p) const { _mm512_storeu_si512(p, v); }
};

// The permute takes the low 4 bits of each index: it is the lookup.
struct Table {
  __m512 centroids;

  explicit Table(const float* from) : centroids(_mm512_loadu_ps(from)) {}
};

struct Pair {
  Vec hi, lo;
};
inline Pair expand(const uint8_t* bytes, const Table& table) {
  const __m512i byte =
      _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  return {{_mm512_permutexvar_ps(_mm512_srli_epi32(byte, 4), table.centroids)},
          {_mm512_permutexvar_ps(byte, table.centroids)}};
}
inline void expand16(const uint8_t* bytes, const Table& table, float* hi, float* lo) {
  const Pair x = expand(bytes, table);
  x.hi.store(hi);
  x.lo.store(lo);
}

}  // namespace
}  // namespace tq::cpu

#include "kernels.inl"

namespace tq::cpu {
const Kernels* avx512_kernels() {
  static constexpr Kernels kernels = table("avx512");
  return &kernels;
}
}  // namespace tq::cpu

#else
const tq::cpu::Kernels* tq::cpu::avx512_kernels() { return nullptr; }
#endif
