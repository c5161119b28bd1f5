// The CPU kernels: what each instruction set implements. Raw pointers only, so that no translation
// unit compiled for a newer instruction set can emit an inline function that others link to.
//
// Everything is arithmetic in float32. A matrix that is the right-hand side of a product is stored
// as *panels* of 16 columns, panel[k][16], one after the other: 16 is what one 16-byte load of
// packed indices expands to, twice, and each panel is read from start to end.
#pragma once

#include <cstdint>

#include "../problem.h"

namespace tq::cpu {

inline constexpr int kPanel = 16;     // columns of a panel
inline constexpr int kTile = 32;      // keys that attention expands at a time
inline constexpr int kMaxRows = 48;   // query rows that share one expanded tile
inline constexpr int kRowBlock = 48;  // vectors that compress and decompress take at a time

constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// 16 bytes hold 32 coordinates: expanded, the 16 even ones come first, then the 16 odd ones. A row
// of expanded values has D rounded up to 32 numbers, in this order.
constexpr int64_t expanded_dim(int64_t D) { return round_up(D, 32); }
constexpr int64_t expanded_position(int64_t d) { return d / 32 * 32 + d % 2 * 16 + d % 32 / 2; }

// n numbers in memory, `stride` elements apart.
struct Strided {
  const void* data;
  Dtype dtype;
  int64_t stride;
};

// One KV head's packed keys or values: row s at data + s * stride, bytes byte_stride apart.
struct PackedHead {
  const uint8_t* data;
  int64_t stride;
  int64_t byte_stride;
  Strided norms;
};

// Unnormalised attention of a block of query rows over keys [first, last) of one KV head.
struct AttendTask {
  int64_t rows, D;
  const float* q;  // [rows][D], rotated, times the scale
  PackedHead k, v;
  const float* centroids;  // [16]
  int64_t first, last;
  int64_t start;               // keys below it are unseen
  const int64_t* limit;        // [rows]: keys from it on are unseen
  const uint8_t* const* mask;  // [rows]: where each row's bools start; or null
  int64_t mask_stride;
  float softcap;   // 0: off
  float* scratch;  // attend_scratch(D) floats
  // Out, unnormalised: each row's largest score, its sum of exp(score - max), and its sum of
  // exp(score - max) · v in the order of expanded_position.
  float* max;
  float* sum;
  float* out;  // [rows][expanded_dim(D)]
};

constexpr int64_t attend_scratch(int64_t D) { return kTile * (D + expanded_dim(D) + kMaxRows + 3); }

// The scores of a task's rows with keys [first, first + n), still without the keys' norms. They
// become unnormalised weights times the values' norms: 0 for keys that a row does not see, which
// those past n up to `padded` count as.
struct ScoreTile {
  int64_t first, n, padded;  // padded: n rounded up to at least 16
  float* scores;             // [rows][stride], in place
  int64_t stride;
  float* correction;  // [rows], out: what each row has summed so far is to be multiplied by it
  float* scratch;     // 3 * padded floats
};

// Up to kRowBlock vectors to compress.
struct CompressTask {
  int64_t rows, D;
  const Strided* x;              // [rows]
  const Strided* offset;         // [rows], subtracted from x; or null
  const float* rotation_panels;  // rotationᵀ: D x round_up(D, 16)
  const float* boundaries;       // [15]
  const float* centroids;        // [16] or null
  NormPolicy policy;
  uint8_t* const* packed;  // [rows]: where to write; null skips the row
  int64_t byte_stride;
  void* const* norms;  // [rows]
  Dtype norm_dtype;
  float* scratch;  // compress_scratch(D) floats
};

constexpr int64_t compress_scratch(int64_t D) {
  return kRowBlock * (D + round_up(D, kPanel) + 1) + round_up(D, kPanel);
}

// Up to kRowBlock vectors to decompress.
struct DecompressTask {
  int64_t rows, D;
  const uint8_t* const* packed;  // [rows]
  int64_t byte_stride;
  const Strided* norms;          // [rows], one number each
  const Strided* offset;         // [rows], added to x; or null
  const float* rotation_panels;  // rotation, its rows in the order of expanded_position
  const float* centroids;
  void* const* x;  // [rows], contiguous
  Dtype dtype;
  float* scratch;  // decompress_scratch(D) floats
};

constexpr int64_t decompress_scratch(int64_t D) {
  return kRowBlock * (expanded_dim(D) + round_up(D, kPanel));
}

struct Kernels {
  const char* isa;
  void (*load)(float* to, Strided from, int64_t n);
  void (*store)(void* to, Dtype dtype, const float* from, int64_t n);
  // C[M][16·panels] = A[M][K] · B, or += if `accumulate`. B's panels lie `panel_stride` apart.
  void (*gemm)(int64_t M, int64_t panels, int64_t K, const float* A, int64_t lda, const float* B,
               int64_t panel_stride, float* C, int64_t ldc, bool accumulate);
  void (*attend)(const AttendTask&);
  void (*softmax)(const AttendTask&, const ScoreTile&);  // a step of attend
  void (*compress)(const CompressTask&);
  void (*decompress)(const DecompressTask&);
};

// One per instruction set, in the file of that name; null where the compiler does not target it.
const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

// The set in use (dispatch.cpp): the best that this processor runs, unless a test chose another.
const Kernels& kernels();

}  // namespace tq::cpu
