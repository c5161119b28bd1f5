// x86 with AVX2, FMA and F16C: 8 floats.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

namespace tq::cpu {
namespace {

struct Vec {
  static constexpr int width = 8;
  static constexpr int few_rows = 4;
  __m256 v;

  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load_bf16(const uint16_t* p) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16))};
  }
  static Vec load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static Vec add(Vec a, Vec b) { return {_mm256_add_ps(a.v, b.v)}; }
  static Vec sub(Vec a, Vec b) { return {_mm256_sub_ps(a.v, b.v)}; }
  static Vec mul(Vec a, Vec b) { return {_mm256_mul_ps(a.v, b.v)}; }
  static Vec div(Vec a, Vec b) { return {_mm256_div_ps(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Vec max(Vec a, Vec b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Vec where_zero(Vec c, Vec a, Vec b) {
    return {_mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(c.v, _mm256_setzero_ps(), _CMP_EQ_OQ))};
  }
  static Vec where_less(Vec a, Vec b, Vec x, Vec y) {
    return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
  }
  static Vec power_of_two(Vec p, Vec t) {
    const __m256i n = _mm256_slli_epi32(_mm256_castps_si256(t.v), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p.v), n))};
  }
  static float reduce_max(Vec a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }
  static float reduce_add(Vec a) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  static void reduce_add4(Vec a, Vec b, Vec c, Vec d, float* sums) {
    const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
    _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1)));
  }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store_bf16(uint16_t* p) const {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    rounded = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
    const __m256i packed = _mm256_packus_epi32(rounded, rounded);  // within 128-bit halves
    const __m256i joined = _mm256_permute4x64_epi64(packed, 0b1000);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(joined));
  }
  void store_f16(uint16_t* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
};

// Four steps of a binary search. A comparison yields -1 for true, so n counts downwards; a permute
// takes its low 3 bits.
struct Boundaries {
  __m256 first, second_low, second_high, third, fourth;

  explicit Boundaries(const float* b)
      : first(_mm256_set1_ps(b[7])),
        second_low(_mm256_set1_ps(b[3])),
        second_high(_mm256_set1_ps(b[11])),
        third(_mm256_setr_ps(b[1], 0, 0, 0, 0, b[13], b[9], b[5])),
        fourth(_mm256_setr_ps(b[0], b[14], b[12], b[10], b[8], b[6], b[4], b[2])) {}
  static __m256i twice_plus_above(__m256i n, Vec x, __m256 b) {
    const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(x.v, b, _CMP_GT_OQ));
    return _mm256_add_epi32(_mm256_add_epi32(n, n), above);
  }
  void below(Vec x, int32_t* index) const {
    __m256i n = twice_plus_above(_mm256_setzero_si256(), x, first);
    n = twice_plus_above(n, x, _mm256_blendv_ps(second_low, second_high, _mm256_castsi256_ps(n)));
    n = twice_plus_above(n, x, _mm256_permutevar8x32_ps(third, n));
    n = twice_plus_above(n, x, _mm256_permutevar8x32_ps(fourth, n));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(index),
                        _mm256_sub_epi32(_mm256_setzero_si256(), n));
  }
};

struct Bytes {
  static constexpr int width = 32;
  __m256i v;

  static Bytes load(const uint8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  static Bytes interleave_low(Bytes a, Bytes b) { return {_mm256_unpacklo_epi8(a.v, b.v)}; }
  static Bytes interleave_high(Bytes a, Bytes b) { return {_mm256_unpackhi_epi8(a.v, b.v)}; }
  void store(uint8_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
};

// A permute takes the low 3 bits of each index, so the table is two of 8, and bit 3, moved to the
// sign, blends them.
struct Table {
  __m256 low, high;

  explicit Table(const float* centroids)
      : low(_mm256_loadu_ps(centroids)), high(_mm256_loadu_ps(centroids + 8)) {}
  Vec look_up(__m256i index, __m256i bit3_as_sign) const {
    return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index),
                             _mm256_permutevar8x32_ps(high, index),
                             _mm256_castsi256_ps(bit3_as_sign))};
  }
};

struct Pair {
  Vec hi, lo;
};
inline Pair expand(const uint8_t* bytes, const Table& table) {
  const __m256i byte =
      _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
  return {table.look_up(_mm256_srli_epi32(byte, 4), _mm256_slli_epi32(byte, 24)),
          table.look_up(byte, _mm256_slli_epi32(byte, 28))};
}
inline void expand16(const uint8_t* bytes, const Table& table, float* hi, float* lo) {
  for (int half = 0; half < 16; half += 8) {
    const Pair x = expand(bytes + half, table);
    x.hi.store(hi + half);
    x.lo.store(lo + half);
  }
}

}  // namespace
}  // namespace tq::cpu

#include "kernels.inl"

namespace tq::cpu {
const Kernels* avx2_kernels() {
  static constexpr Kernels kernels = table("avx2");
  return &kernels;
}
}  // namespace tq::cpu

#else
const tq::cpu::Kernels* tq::cpu::avx2_kernels() { return nullptr; }
#endif
