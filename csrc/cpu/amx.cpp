// Attention on the matrix units of x86 (AMX, bf16).
//
// A tile register holds 16 rows of 64 bytes. One instruction adds A · B to C, in 16 cycles: A is
// 16 x 32 numbers in bf16, B is 32 x 16 with pairs of rows interleaved, C is 16 x 16 in float32.
//
//                    A                         B                          C
//   scores           16 keys x 32 coordinates  32 coordinates x 16 q      16 keys x 16 q
//   weighted values  16 weights x 32 keys      32 keys x 16 coordinates   16 q x 16 coordinates
//
// Keys and values are bf16 by a codebook of 16 levels. q and the weights are sums of two bf16
// numbers, of 16 bits together: the 16 q or weights of a tile are the two parts of 8 query rows.
//
// 64 keys x 128 coordinates are expanded at a time, to 16 KiB that are read back from the L1 cache.
// Measured: with three times as much it takes 1.3 times as long; expanding the next keys while the
// unit multiplies, 1.5 times. Cost of a key, for each 128 coordinates of it and of its value: 8
// lookups of 32 numbers; for 8 query rows, 8 cycles of the matrix unit.
#include "amx.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#include <immintrin.h>

namespace tq::cpu {
namespace {

constexpr int kWords = 16 * 32;   // numbers of an A or a B,
constexpr int kFloats = 16 * 16;  // and of a C
constexpr int kRowBytes = 64;

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kConfig;

// To the compiler, loading a tile does not read memory: what it is to read must be there first.
inline void finish_stores() { __asm__ volatile("" ::: "memory"); }

// ----------------------------------------------------------------------------------- expansion

// centroid = level · unit. The levels are there twice, since a lookup takes 5 bits and an index has
// 4. At this unit the levels for a normal distribution lie four times closer to bf16 numbers than
// chance would have it; any other codebook is rounded as usual.
struct Codebook {
  __m512i levels;
  float unit = 1;

  explicit Codebook(const float* from) {
    constexpr float kTopLevel = 1.444765f;
    const __m512 centroids = _mm512_loadu_ps(from);
    const float top = _mm512_reduce_max_ps(_mm512_abs_ps(centroids));
    if (top > 0) unit = top / kTopLevel;
    const __m512i bits = _mm512_castps_si512(_mm512_div_ps(centroids, _mm512_set1_ps(unit)));
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    levels = _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(rounded));
  }
};

// 32 words of 4 indices each, to row 0 of four tiles. From the lowest bits on, word i of a packed
// vector holds the coordinates 4i + 1, 4i, 4i + 3, 4i + 2: tile t has the coordinates 4i + (t ^ 1).
inline void expand(__m512i words, const Codebook& codebook, uint16_t* tiles) {
  const __m512i shifted[] = {words, _mm512_srli_epi16(words, 4), _mm512_srli_epi16(words, 8),
                             _mm512_srli_epi16(words, 12)};
  for (int t = 0; t < 4; ++t)
    _mm512_storeu_si512(tiles + t * kWords, _mm512_permutexvar_epi16(shifted[t], codebook.levels));
}

// Coordinates [c, c + 128) of packed vectors, 0 from D on. The vectors from `last` on may lie past
// the buffer; they get no weight and are taken to be the one before.
struct Column {
  const uint8_t* data;
  int64_t stride, last;
  __mmask64 mask;

  Column(const PackedHead& x, int64_t last, int64_t c, int64_t D)
      : data(x.data + c / 2),
        stride(x.stride),
        last(last),
        mask(D - c < kAmxDim ? (__mmask64{1} << (D - c) / 2) - 1 : ~__mmask64{0}) {}

  __m512i load(int64_t i) const {
    const uint8_t* from = data + (i < last ? i : last - 1) * stride;
    _mm_prefetch(from + kAmxKeys * stride, _MM_HINT_T1);
    return _mm512_maskz_loadu_epi8(mask, from);
  }
};

// 64 keys as A: for each 16 of them four tiles [key][word].
inline void expand_keys(const Column& keys, int64_t first, const Codebook& codebook,
                        uint16_t* tiles) {
  for (int64_t j = 0; j < kAmxBlock; j += 16, tiles += 4 * kWords)
    for (int64_t i = 0; i < 16; ++i) expand(keys.load(first + j + i), codebook, tiles + i * 32);
}

// 64 values as B: for each 32 of them eight tiles [i][16 words]{value i, value i + 16}. The packed
// words are interleaved, which is half the work of interleaving the expanded ones.
inline void expand_values(const Column& values, int64_t first, const Codebook& codebook,
                          uint16_t* tiles) {
  for (int64_t j = 0; j < kAmxBlock; j += 32, tiles += 8 * kWords) {
    for (int64_t i = 0; i < 16; ++i) {
      const __m512i a = values.load(first + j + i), b = values.load(first + j + i + 16);
      expand(_mm512_unpacklo_epi16(a, b), codebook, tiles + i * 32);
      expand(_mm512_unpackhi_epi16(a, b), codebook, tiles + i * 32 + 4 * kWords);
    }
  }
}

// ---------------------------------------------------------------------------- q, weights, output

// Pairs {even[i], odd[i]} as the sum of two pairs of bf16 numbers, by cutting off bits.
inline void split(__m512 even, __m512 odd, __m512i parts[2]) {
  const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int i = 0; i < 2; ++i) {
    const __m512i a = _mm512_and_si512(_mm512_castps_si512(even), upper);
    const __m512i b = _mm512_and_si512(_mm512_castps_si512(odd), upper);
    parts[i] = _mm512_or_si512(_mm512_srli_epi32(a, 16), b);
    even = _mm512_sub_ps(even, _mm512_castsi512_ps(a));
    odd = _mm512_sub_ps(odd, _mm512_castsi512_ps(b));
  }
}

// q · unit as B, its coordinates in the order of expand(): [8 rows] W / 32 tiles
// [i][part][row]{word 2i, word 2i + 1}.
inline void arrange_queries(const AttendTask& task, int64_t W, float unit, uint16_t* q) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i every_8th = _mm512_slli_epi32(lane, 3), tile_row = _mm512_slli_epi32(lane, 4);
  __builtin_memset(q, 0, round_up(task.rows, kAmxRows) * W * sizeof(float));
  for (int64_t r = 0; r < task.rows; ++r) {
    for (int64_t t = 0; t < W / 32; ++t) {
      const auto load = [&](int64_t d) {
        const __mmask16 inside =
            _mm512_cmplt_epi32_mask(every_8th, _mm512_set1_epi32(static_cast<int>(task.D - d)));
        const __m512 x = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), inside, every_8th,
                                                  task.q + r * task.D + d, sizeof(float));
        return _mm512_mul_ps(x, _mm512_set1_ps(unit));
      };
      const int64_t d = t / 4 * kAmxDim + (t % 4 ^ 1);
      __m512i parts[2];
      split(load(d), load(d + 4), parts);
      uint16_t* to = q + (r / kAmxRows * (W / 32) + t) * kWords + r % kAmxRows * 2;
      for (int part = 0; part < 2; ++part)
        _mm512_i32scatter_epi32(to + part * 16, tile_row, parts[part], 4);
    }
  }
}

// Weights of 8 rows and 32 keys as A: [part][row][16]{key i, key i + 16}.
inline void arrange_weights(const float* weights, uint16_t* tile) {
  for (int64_t r = 0; r < kAmxRows; ++r, weights += kAmxKeys) {
    __m512i parts[2];
    split(_mm512_loadu_ps(weights), _mm512_loadu_ps(weights + 16), parts);
    for (int part = 0; part < 2; ++part)
      _mm512_storeu_si512(tile + (part * kAmxRows + r) * 32, parts[part]);
  }
}

// The products C [16 keys][part][8 rows] to scores[row][key], the two parts added up.
inline void arrange_scores(const float* products, float* scores) {
  __m512 x[8], y[8];
  for (int i = 0; i < 8; ++i) {  // keys j and j + 4, 8 rows of each
    const int j = i + (i & 4);
    const auto load = [&](int part) {
      const float* from = products + j * 16 + part * kAmxRows;
      return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(from)),
                                _mm256_loadu_ps(from + 4 * 16), 1);
    };
    x[i] = _mm512_add_ps(load(0), load(1));
  }
  for (int i = 0; i < 8; i += 4) {  // transpose 4 x 4 numbers in each quarter
    const __m512 a = _mm512_unpacklo_ps(x[i], x[i + 1]);
    const __m512 b = _mm512_unpackhi_ps(x[i], x[i + 1]);
    const __m512 c = _mm512_unpacklo_ps(x[i + 2], x[i + 3]);
    const __m512 d = _mm512_unpackhi_ps(x[i + 2], x[i + 3]);
    y[i] = _mm512_shuffle_ps(a, c, 0x44), y[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    y[i + 2] = _mm512_shuffle_ps(b, d, 0x44), y[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  for (int r = 0; r < 4; ++r) {  // rows r and r + 4 alternate by quarters
    _mm512_storeu_ps(scores + r * kAmxKeys, _mm512_shuffle_f32x4(y[r], y[r + 4], 0x88));
    _mm512_storeu_ps(scores + (r + 4) * kAmxKeys, _mm512_shuffle_f32x4(y[r], y[r + 4], 0xdd));
  }
}

// sums [8 rows] W / 16 tiles [part][row][16 coordinates], in the order of expand(), to out.
inline void arrange_output(const float* sums, const AttendTask& task, int64_t W, float unit) {
  const int64_t width = expanded_dim(task.D);
  const __m512i position =
      _mm512_setr_epi32(0, 2, 4, 6, 32, 34, 36, 38, 64, 66, 68, 70, 96, 98, 100, 102);
  for (int64_t r = 0; r < task.rows; ++r) {
    for (int64_t t = 0; t < W / 16; ++t) {
      // Coordinates d + {0, 4, 8, 12} + {0, 32, 64, 96}.
      const int64_t d = t / 8 * kAmxDim + t / 4 % 2 * 16 + (t % 4 ^ 1), at = expanded_position(d);
      const float* from = sums + (r / kAmxRows * (W / 16) + t) * kFloats + r % kAmxRows * 16;
      const __m512 sum =
          _mm512_add_ps(_mm512_loadu_ps(from), _mm512_loadu_ps(from + kAmxRows * 16));
      const __mmask16 inside =
          _mm512_cmplt_epi32_mask(position, _mm512_set1_epi32(static_cast<int>(width - at)));
      _mm512_mask_i32scatter_ps(task.out + r * width + at, inside, position,
                                _mm512_mul_ps(sum, _mm512_set1_ps(unit)), sizeof(float));
    }
  }
}

// ------------------------------------------------------------------------------------- products

inline void load_products(const float* c) {
  _tile_loadd(0, c, kRowBytes);
  _tile_loadd(1, c + kFloats, kRowBytes);
  _tile_loadd(2, c + 2 * kFloats, kRowBytes);
  _tile_loadd(3, c + 3 * kFloats, kRowBytes);
}
inline void store_products(float* c) {
  _tile_stored(0, c, kRowBytes);
  _tile_stored(1, c + kFloats, kRowBytes);
  _tile_stored(2, c + 2 * kFloats, kRowBytes);
  _tile_stored(3, c + 3 * kFloats, kRowBytes);
}

// c[64 keys] = or += keys · q over 128 coordinates: four tiles of keys side by side.
inline void score(const uint16_t* keys, const uint16_t* q, float* c, bool accumulate) {
  if (accumulate) {
    load_products(c);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < 4; ++i, keys += kWords, q += kWords) {
    _tile_loadd(4, q, kRowBytes);
    _tile_loadd(5, keys, kRowBytes);
    _tile_dpbf16ps(0, 5, 4);
    _tile_loadd(6, keys + 4 * kWords, kRowBytes);
    _tile_dpbf16ps(1, 6, 4);
    _tile_loadd(7, keys + 8 * kWords, kRowBytes);
    _tile_dpbf16ps(2, 7, 4);
    _tile_loadd(5, keys + 12 * kWords, kRowBytes);
    _tile_dpbf16ps(3, 5, 4);
  }
  store_products(c);
}

// c[64 coordinates] += weights · values over 64 keys: four tiles of coordinates side by side.
inline void weigh(const uint16_t* weights, const uint16_t* values, float* c) {
  load_products(c);
  for (int64_t i = 0; i < kAmxBlock / 32; ++i, weights += kWords, values += 8 * kWords) {
    _tile_loadd(4, weights, kRowBytes);
    _tile_loadd(5, values, kRowBytes);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, values + kWords, kRowBytes);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(7, values + 2 * kWords, kRowBytes);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, values + 3 * kWords, kRowBytes);
    _tile_dpbf16ps(3, 4, 5);
  }
  store_products(c);
}

void attend(const AttendTask& task) {
  const int64_t rows = task.rows, D = task.D, W = round_up(D, kAmxDim);
  const int64_t groups = round_up(rows, kAmxRows) / kAmxRows;
  float* scratch = task.scratch;
  const auto take = [&](int64_t floats) { return scratch += floats, scratch - floats; };
  const auto take_words = [&](int64_t n) { return reinterpret_cast<uint16_t*>(take(n / 2)); };
  uint16_t* expanded = take_words(kAmxBlock * kAmxDim);
  uint16_t* q = take_words(groups * W / 32 * kWords);
  uint16_t* weights = take_words(groups * kAmxBlock / 32 * kWords);
  float* sums = take(groups * W / 16 * kFloats);
  float* products = take(groups * kAmxBlock / 16 * kFloats);
  float* scores = take(groups * kAmxRows * kAmxKeys);
  float* norms = take(3 * kAmxKeys);
  float correction[kMaxRows];

  const Codebook codebook(task.centroids);
  arrange_queries(task, W, codebook.unit, q);
  for (int64_t r = 0; r < rows; ++r) task.max[r] = -__builtin_huge_valf(), task.sum[r] = 0;
  for (int64_t i = 0; i < groups * W / 16 * kFloats; ++i) sums[i] = 0;

  _tile_loadconfig(&kConfig);
  for (int64_t first = task.first; first < task.last; first += kAmxKeys) {
    const int64_t n = task.last - first < kAmxKeys ? task.last - first : kAmxKeys;
    const int64_t padded = round_up(n, kAmxBlock);
    for (int64_t j = 0; j < padded; j += kAmxBlock) {
      for (int64_t c = 0; c < W; c += kAmxDim) {
        expand_keys({task.k, task.last, c, D}, first + j, codebook, expanded);
        finish_stores();
        for (int64_t g = 0; g < groups; ++g)
          score(expanded, q + (g * W + c) / 32 * kWords, products + g * 4 * kFloats, c > 0);
      }
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t i = 0; i < 4; ++i)
          arrange_scores(products + (g * 4 + i) * kFloats,
                         scores + g * kAmxRows * kAmxKeys + j + i * 16);
    }

    avx512_kernels()->softmax(task, {first, n, padded, scores, kAmxKeys, correction, norms});
    for (int64_t r = 0; r < rows; ++r) {
      if (correction[r] == 1) continue;
      float* sum = sums + r / kAmxRows * (W / 16) * kFloats + r % kAmxRows * 16;
      for (int64_t part = 0; part < 2 * (W / 16); ++part, sum += kAmxRows * 16)
        for (int64_t i = 0; i < 16; ++i) sum[i] *= correction[r];
    }

    for (int64_t j = 0; j < padded; j += kAmxBlock) {
      for (int64_t g = 0; g < groups; ++g)
        for (int64_t i = 0; i < 2; ++i)
          arrange_weights(scores + g * kAmxRows * kAmxKeys + j + i * 32,
                          weights + (g * 2 + i) * kWords);
      for (int64_t c = 0; c < W; c += kAmxDim) {
        expand_values({task.v, task.last, c, D}, first + j, codebook, expanded);
        finish_stores();
        for (int64_t g = 0; g < groups; ++g)
          for (int64_t t = 0; t < 8; t += 4)
            weigh(weights + g * 2 * kWords, expanded + t * kWords,
                  sums + ((g * W + c) / 16 + t) * kFloats);
      }
    }
  }
  _tile_release();
  arrange_output(sums, task, W, codebook.unit);
}

}  // namespace

Attend amx_attend() { return &attend; }

}  // namespace tq::cpu

#else
tq::cpu::Attend tq::cpu::amx_attend() { return nullptr; }
#endif
