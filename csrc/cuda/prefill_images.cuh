// Compressed keys and values to fp16 images in shared memory (prefill.h).
//
// Four warps make an image, each a quarter of its rows. A lane fetches pieces of 16 bytes of 8 rows
// side by side, an image ahead, to places in shared memory that are its own. Each byte is looked up
// in a table of its two levels that is repeated for every lane, so that no two ever want the same
// bank, and multiplied by its row's norm; 8 coordinates are stored at a time, 8 rows to 8 different
// banks.
//
// Cost of 1024 coordinates: 80 instructions of a warp, and 16 passes through shared memory to look
// up, 16 to store. At D = 128 these are 1K clocks for a tile of keys and values, in which 1K warp
// instructions go to each of four schedulers: they bind, for the products with 128 rows last 2K.
//
// Norms. What is stored is norm / unit · level, where the unit of a KV head's keys, and that of its
// values, is the power of two of its last norm. fp16 holds this well as long as norms lie within a
// factor of 2^8 of the unit. A warp that meets others sets the flag of its quarter, stores levels
// alone, and norms beside them, which go with the scores and the weights (prefill.cuh, soften):
// weights may be large where values are small, and the norm of a key that nobody sees may be
// anything. Of keys: norm / unit. Of values: log2(size), and 1 / size behind those of all rows,
// where size is |norm| / unit but no less than 2^-80; the image has what is missing, and the sign.
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

// One of the four warps that make images of keys, or of values.
template <int D, bool kValues>
class ImageMaker {
  static constexpr int kKeys = prefill_keys(D), kRows = kKeys / 4;  // of a warp
  static constexpr int kWords = D % 32 == 0 ? 4 : 2;                // to a piece
  static constexpr int kPieces = D / 8 / kWords;                    // of a row
  static constexpr int kLoads = kRows * kPieces / 32;               // of a lane, to an image

 public:
  static constexpr int kStageBytes = kKeys * D / 2;  // what an image is made of

  // Shared addresses.
  __device__ ImageMaker(const AttentionProblem& p, uint32_t table, uint32_t stage)
      : p_(p),
        warp_(threadIdx.x / 32 % 4),
        lane_(threadIdx.x % 32),
        table_(table + 4 * lane_),
        stage_(stage + warp_ * (kStageBytes / 4) + lane_ * 4 * kWords) {}

  __device__ void start(const KeyRange& keys) {
    keys_ = keys;
    exponents_[0] = norm_exponent(p_.k_norms, keys);
    exponents_[1] = norm_exponent(p_.v_norms, keys);
  }

  // Fetches what the image of tile j is made of. What was fetched before has been used.
  __device__ void fetch(int j) {
    const View& packed = kValues ? p_.v_packed : p_.k_packed;
    const auto* const bytes = static_cast<const uint8_t*>(packed.data) +
                              offset_of(packed, keys_.b, keys_.h, j * kKeys + row_of(0));
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int row = row_of(i);
      copy_async<4 * kWords>(
          stage(i), bytes + (row - row_of(0)) * packed.stride[2] + 4 * kWords * piece_of(i),
          j * kKeys + row < keys_.length);
    }
    copies_commit();
    if (!kValues) fetch_norm(p_.k_norms, j, &norms_[0]);
    fetch_norm(p_.v_norms, j, &norms_[1]);
  }

  // Makes the image, at a shared address. Those who make keys' images write the norms of both.
  // kOthers: groups of copies that these warps have started since for other images.
  template <int kOthers = 0>
  __device__ void make(uint32_t image, uint32_t norms) const {
    uint32_t multiplier = take_norms<true, !kValues>(norms + 16, norms + 32 + 4 * kKeys);
    if (!kValues) multiplier = take_norms<false, true>(norms, norms + 32);
    copies_wait<kOthers>();
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      uint32_t words[kWords], levels[kWords][4];
      load_words(words, stage(i));
#pragma unroll
      for (int k = 0; k < kWords; ++k)
#pragma unroll
        for (int b = 0; b < 4; ++b)
          levels[k][b] = load_shared(table_ + 128 * __byte_perm(words[k], 0, 0x4440 | b));
      const int row = row_of(i), c = piece_of(i) * kWords;
      const __half2 norm = as_half2(__shfl_sync(~0u, multiplier, row % kRows));
      // Piece c of 16 bytes lies where c ^ (row % 8) would be.
      const uint32_t to = image + c / 8 * (kKeys * 128) + row * 128 + ((c ^ row) & 7) * 16;
#pragma unroll
      for (int k = 0; k < kWords; ++k) {
#pragma unroll
        for (int b = 0; b < 4; ++b) levels[k][b] = as_bits(__hmul2(as_half2(levels[k][b]), norm));
        store_shared4(to ^ 16 * k, levels[k]);
      }
    }
  }

 private:
  // What a lane's load number i brings.
  __device__ int row_of(int i) const {
    return warp_ * kRows + (4 * i + lane_ / 8) / kPieces * 8 + lane_ % 8;
  }
  __device__ int piece_of(int i) const { return (4 * i + lane_ / 8) % kPieces; }
  __device__ uint32_t stage(int i) const { return stage_ + i * (32 * 4 * kWords); }

  // The norm of the warp's row `lane`, as it is in memory: a conversion would wait for it.
  __device__ void fetch_norm(const View& v, int j, uint32_t* norm) const {
    const int key = j * kKeys + warp_ * kRows + lane_ % kRows;
    const int64_t from = offset_of(v, keys_.b, keys_.h, key);
    *norm = 0;
    if (key >= keys_.start && key < keys_.length)
      *norm = v.dtype == Dtype::f32 ? static_cast<const uint32_t*>(v.data)[from]
                                    : static_cast<const uint16_t*>(v.data)[from];
  }

  // Returns what the levels of the warp's row `lane` are multiplied by, twice in 32 bits.
  template <bool kOfValues, bool kWrite>
  __device__ uint32_t take_norms(uint32_t flags, uint32_t each) const {
    const View& view = kOfValues ? p_.v_norms : p_.k_norms;
    const uint32_t bits = view.dtype == Dtype::f32 ? norms_[kOfValues] : norms_[kOfValues] << 16;
    const uint32_t exponent = exponents_[kOfValues], size_bits = bits & 0x7fffffff;
    const float own = __uint_as_float(bits) * __uint_as_float((254 - exponent) << 23);
    float multiplier = own;
    const bool far = size_bits - ((exponent - 8) << 23) > (16u << 23) && size_bits != 0;
    const bool even = !__any_sync(~0u, far);
    if (!even) [[unlikely]] {
      each += 4 * (warp_ * kRows + lane_ % kRows);
      if (kOfValues) {
        const float size = fmaxf(fabsf(own), 0x1p-80f);
        const bool finite = size < INFINITY && own == own;
        multiplier = finite ? own / size : 0;  // the sign; less than 1 if the norm is tiny
        if (kWrite) {
          store_shared(each, __float_as_uint(finite ? __log2f(size) : NAN));
          store_shared(each + 4 * kKeys, __float_as_uint(finite ? 1 / size : 1));
        }
      } else {
        multiplier = own != 0;
        store_shared(each, __float_as_uint(own));
      }
    }
    if (kWrite && lane_ == 0) store_shared(flags + 4 * warp_, !even);
    return as_bits(__float2half2_rn(multiplier));
  }

  const AttentionProblem& p_;
  KeyRange keys_;
  uint32_t exponents_[2];
  int warp_, lane_;
  uint32_t table_, stage_;
  uint32_t norms_[2];
};

}  // namespace tq::cuda
