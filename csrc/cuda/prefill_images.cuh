// Compressed keys and values to fp16 images in shared memory (prefill.h).
//
// Four warps make an image, each a quarter of its rows. A lane fetches pieces of 16 bytes of 8 rows
// side by side to places in shared memory that are its own, and the same piece of the next image as
// soon as it has read one. Each byte is looked up in a table of its two levels that is repeated for
// every lane, so that no two ever want the same bank, and multiplied by its row's norm; 8
// coordinates are stored at a time, 8 rows to 8 different banks.
//
// Cost of 1024 coordinates: 60 instructions of a warp, and 16 passes through shared memory to look
// up, 16 to store. At D = 128 these are 1K clocks for a tile of keys and values. In the fused
// kernel it takes 3.6K: the products read shared memory as often, and the softmax has its
// instructions.
//
// Norms. What is stored is norm / unit · level, where the unit of a KV head's keys, and that of its
// values, is the power of two of its last norm. fp16 holds this well as long as norms lie within a
// factor of 2^8 of the unit. A warp that meets others sets the flag of its quarter, stores levels
// alone, and norms beside them, which go with the scores and the weights (prefill.cuh, soften):
// weights may be large where values are small, and the norm of a key that nobody sees may be
// anything. Of keys: norm / unit. Of values: log2(size), and 1 / size behind those of all rows,
// where size is |norm| / unit but no less than 2^-80, nor is |norm| taken for less: together with
// the largest, that is what exponents of float32 hold. The image has what is missing, and the sign.
#pragma once

#include "device/wgmma.cuh"
#include "prefill.h"

namespace tq::cuda {

// The codebook in shared memory: byte -> the levels of its two nibbles, [256][32 lanes].
struct LevelTable {
  static constexpr int kBytes = 256 * 32 * 4;
  // Levels are centroids, the largest of which is made so large: then those of the standard
  // codebook are √D · kLevelScale times its centroids, close to fp16 numbers (decode.h).
  static constexpr float kLargest = 2.7326f * kLevelScale;

  // What a level is to be multiplied by to be its centroid. By all lanes of a warp.
  static __device__ float unit(const float* centroids) {
    const uint32_t size = __float_as_uint(fabsf(__ldg(centroids + threadIdx.x % kLevels)));
    return __uint_as_float(__reduce_max_sync(~0u, size)) / kLargest;
  }

  // By all threads of a block. Returns unit().
  static __device__ float fill(char* table, const float* centroids) {
    const float scale = unit(centroids);
    const float level = scale > 0 ? __ldg(centroids + threadIdx.x % kLevels) / scale : 0;
    for (int i = threadIdx.x; i < 256 * 8; i += blockDim.x) {  // whole warps
      const float high = __shfl_sync(~0u, level, i / 128),
                  low = __shfl_sync(~0u, level, i / 8 % 16);
      const uint32_t pair = half_pair(high, low);
      reinterpret_cast<uint4*>(table)[i] = {pair, pair, pair, pair};
    }
    return scale;
  }
};

// The keys that count of a KV head.
struct KeyRange {
  int b, h, start, length;

  KeyRange() = default;
  __device__ KeyRange(const AttentionProblem& p, int b_, int h_)
      : b(b_),
        h(h_),
        start(static_cast<int>(min(p.start(b), p.length(b)))),
        length(static_cast<int>(p.length(b))) {}
};

// The exponent, as it stands in a float, of the unit of a KV head's keys or values.
__device__ inline uint32_t norm_exponent(const View& norms, const KeyRange& keys) {
  if (keys.length == 0) return 127;
  const float last = load_element(norms, offset_of(norms, keys.b, keys.h, keys.length - 1));
  const uint32_t exponent = __float_as_uint(last) >> 23 & 255;
  return exponent == 0 || exponent == 255 ? 127 : min(max(exponent, 127u - 80), 127u + 80);
}

// One of the four warps that make images of keys, or of values. Registers are few: what follows
// from the lane alone is computed again where it is not regular.
template <int D, bool kValues>
class ImageMaker {
  static constexpr int kKeys = prefill_keys(D), kRows = kKeys / 4;  // of a warp
  static constexpr int kWords = D % 32 == 0 ? 4 : 2;                // to a piece
  static constexpr int kPieces = D / 8 / kWords;                    // of a row
  static constexpr int kLoads = kRows * kPieces / 32;               // of a lane, to an image

 public:
  static constexpr int kStageBytes = kKeys * D / 2;  // what an image is made of

  // Shared addresses.
  __device__ ImageMaker(const AttentionProblem& p, uint32_t table, uint32_t stage) : p_(p) {
    const Thread thread;
    table_ = table + 4 * thread.lane;
    stage_ = stage + thread.warp % 4 * (kStageBytes / 4) + thread.lane * 4 * kWords;
    place_ = Piece(0).place();
  }

  // From a column on, if an image has but some of them.
  __device__ void start(const KeyRange& keys, int column = 0) {
    start_ = keys.start, length_ = keys.length;
    const View& packed = kValues ? p_.v_packed : p_.k_packed;
    const Piece piece(0);
    from_ = static_cast<const uint8_t*>(packed.data) +
            offset_of(packed, keys.b, keys.h, piece.row) + column / 2 + 4 * kWords * piece.number;
    const View& v = norms();
    exponent_ = norm_exponent(v, keys);
    norms_from_ =
        static_cast<const char*>(v.data) + offset_of(v, keys.b, keys.h, warp_row()) * norm_size();
  }

  // Fetches what the image of tile j is made of, the first of a KV head.
  __device__ void fetch(int j) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) fetch_piece(i, j);
    copies_commit();
    fetch_norm(j);
  }

  // Finds what the rows are multiplied by, and writes what comes beside the next image, at a shared
  // address: flags first.
  __device__ void take_norms(uint32_t place) {
    const uint32_t bits = norm_size() == 4 ? norm_ : norm_ << 16;
    const uint32_t size_bits = bits & 0x7fffffff;
    const float of_unit = __uint_as_float((254 - exponent_) << 23);
    const float own = __uint_as_float(bits) * of_unit;
    float multiplier = own;
    const bool far = size_bits - ((exponent_ - 8) << 23) > (16u << 23) && size_bits != 0;
    const bool even = !__any_sync(~0u, far);
    const Thread thread;
    if (thread.lane == 0) store_shared(place + 4 * (thread.warp % 4), !even);
    if (!even) [[unlikely]] {
      const uint32_t each = place + 16 + 4 * warp_row();
      if (kValues) {
        const float size = fmaxf(fabsf(own), 0x1p-80f * fmaxf(of_unit, 1));
        const bool finite = size < INFINITY && own == own;
        multiplier = finite ? own / size : 0;  // the sign; less than 1 if the norm is tiny
        store_shared(each, __float_as_uint(finite ? __log2f(size) : NAN));
        store_shared(each + 4 * kKeys, __float_as_uint(finite ? 1 / size : 1));
      } else {
        multiplier = own != 0;
        store_shared(each, __float_as_uint(own));
      }
    }
    multiplier_ = as_bits(__float2half2_rn(multiplier));
  }

  // Makes the image, at a shared address, and fetches what that of tile `next` is made of, each
  // piece as soon as its place is free. kOthers: groups of copies that these warps have started
  // since for other images.
  template <int kOthers = 0>
  __device__ void make(uint32_t image, int next) {
    copies_wait<kOthers>();
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      uint32_t words[kWords], levels[kWords][4];
      load_words(words, stage(i));
#pragma unroll
      for (int k = 0; k < kWords; ++k)
#pragma unroll
        for (int b = 0; b < 4; ++b)  // a byte times 128, and where the table is
          levels[k][b] = load_shared(__dp4a(words[k], 128u << 8 * b, table_));
      fetch_piece(i, next);
      const __half2 norm = as_half2(__shfl_sync(~0u, multiplier_, row_of(i)));
      const uint32_t to = image + place_of(i);
#pragma unroll
      for (int k = 0; k < kWords; ++k) {
#pragma unroll
        for (int b = 0; b < 4; ++b) levels[k][b] = as_bits(__hmul2(as_half2(levels[k][b]), norm));
        store_shared4(to ^ 16 * k, levels[k]);
      }
    }
    fetch_norm(next);
    copies_commit();
  }

 private:
  // What a lane's load number i brings, of a tile: 8 rows side by side, whose pieces go to four
  // loads of 8 lanes.
  struct Piece {
    int row, number;

    __device__ explicit Piece(int i) {
      const Thread thread;
      row = thread.warp % 4 * kRows + (4 * i + thread.lane / 8) / kPieces * 8 + thread.lane % 8;
      number = (4 * i + thread.lane / 8) % kPieces;
    }
    // In the image. Number c of 16 bytes lies where c ^ (row % 8) would be.
    __device__ uint32_t place() const {
      const int c = number * kWords;
      return c / 8 * (kKeys * 128) + row * 128 + ((c ^ row) & 7) * 16;
    }
  };
  // Where pieces of load i are those of load 0, so many rows and pieces on.
  static constexpr bool kRegular = kPieces % 4 == 0 || 4 % kPieces == 0;
  static __device__ constexpr int rows_on(int i) { return 4 * i / kPieces * 8; }
  static __device__ constexpr int pieces_on(int i) { return 4 * i % kPieces; }

  __device__ uint32_t place_of(int i) const {
    if (!kRegular) return Piece(i).place();
    return place_ + pieces_on(i) * kWords / 8 * (kKeys * 128) + rows_on(i) * 128;
  }
  // Of the warp's rows.
  static __device__ int row_of(int i) {
    return Piece(kRegular ? 0 : i).row % kRows + (kRegular ? rows_on(i) : 0);
  }
  __device__ uint32_t stage(int i) const { return stage_ + i * (32 * 4 * kWords); }

  __device__ void fetch_piece(int i, int j) const {
    const int64_t stride = (kValues ? p_.v_packed : p_.k_packed).stride[2];
    const Piece first(0), piece(i);
    const int rows = kRegular ? rows_on(i) : piece.row - first.row;
    const int pieces = kRegular ? pieces_on(i) : piece.number - first.number;
    const uint8_t* const from = from_ + (j * kKeys + rows) * stride + 4 * kWords * pieces;
    const bool all = j * kKeys + rows + first.row < length_;
    if constexpr (kWords == 4)
      copy16_async(stage(i), from, all ? 16 : 0);
    else
      copy8_async(stage(i), from, all);
  }

  // The tile's row whose norm this lane has.
  static __device__ int warp_row() {
    const Thread thread;
    return thread.warp % 4 * kRows + thread.lane % kRows;
  }
  __device__ const View& norms() const { return kValues ? p_.v_norms : p_.k_norms; }
  __device__ int norm_size() const { return norms().dtype == Dtype::f32 ? 4 : 2; }
  // As it is in memory: a conversion would wait for it.
  __device__ void fetch_norm(int j) {
    const int key = j * kKeys + warp_row();
    const char* const from = norms_from_ + j * kKeys * norms().stride[2] * norm_size();
    norm_ = 0;
    if (key >= start_ && key < length_)
      norm_ = norm_size() == 4 ? *reinterpret_cast<const uint32_t*>(from)
                               : *reinterpret_cast<const uint16_t*>(from);
  }

  const AttentionProblem& p_;
  int start_, length_;        // the keys that count
  const uint8_t* from_;       // the lane's first piece of tile 0
  const char* norms_from_;    // the norm of its row of tile 0
  uint32_t exponent_, norm_;  // the unit; of its row of the next tile
  uint32_t multiplier_;       // of its row of this tile, twice in 32 bits
  uint32_t table_, stage_, place_;
};

}  // namespace tq::cuda
