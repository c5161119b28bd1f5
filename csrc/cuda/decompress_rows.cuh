// A warp's 16 compressed vectors on their way through decompress_tiles.cu.
//
//   fetch      bytes and norms to registers, ahead of the work: a thread's piece of 4 to 16
//              adjacent bytes at a time, four threads' pieces adjacent
//   take       as operand A (fragments: codec.cuh): a table finds the two fp16 levels of a byte
//              (device/table.cuh)
//   store      what the product with the rotation made of them, times the norm; the rotation's
//              columns are ordered such that a thread has 8 adjacent coordinates of a vector, 16
//              bytes, and four threads write 64
//
// Levels are scaled by a power of two that brings the largest to 2^8, undone with the norm.
#pragma once

#include "codec.cuh"
#include "device/table.cuh"

namespace tq::cuda {

// The table in shared memory, and what undoes its scale.
class Levels {
 public:
  static constexpr int kBytes = 256 * Table::kStride;

  // By all threads of the block. `table`: kBytes bytes, at a multiple of 256.
  template <int kWarps>
  __device__ void fill(char* table, const float* centroids) {
    table_ = shared_address(table);
    const float centroid = centroids[threadIdx.x % kLevels];
    // Of the largest: 8 bits of exponent.
    const uint32_t exponent = __reduce_max_sync(~0u, __float_as_uint(fabsf(centroid))) >> 23;
    const bool usual = exponent > 27 && exponent < 227;
    unit_ = usual ? __uint_as_float((exponent - 8) << 23) : 1;
    const float scale = usual ? __uint_as_float((254 - (exponent - 8)) << 23) : 1;
    Table::fill<kWarps>(table, centroid, scale);
  }
  __device__ uint32_t of(uint32_t word, int byte) const {
    return Table::levels(table_, word, byte, threadIdx.x % 32 * 4);
  }
  __device__ float unit() const { return unit_; }

 private:
  uint32_t table_;
  float unit_;
};

template <int D>
class CompressedRows : public TileRows<DecompressProblem> {
 public:
  static constexpr int kChunks = chunks_of(D), kSteps = 2 * kChunks;
  // Bytes of a thread's piece of a row.
  static constexpr int kPiece = D % 128 == 0 ? 16 : D % 64 == 0 ? 8 : 4;

  __device__ CompressedRows(const DecompressProblem& p, const Order& order) : TileRows(p, order) {}

  // Asks for the bytes and norms of a tile, if it exists.
  __device__ void fetch(uint32_t tile) {
    next_ = {};
    int64_t from = -1;
    if (Position at; find(tile, &at)) {
      from = offset_of(p_.packed, at.b, at.h, at.s);
      next_.x = offset_of(p_.x, at.b, at.h, at.s);
      if (p_.offset) next_.offset = offset_of(p_.offset, at.b, at.h, 0);
      const int64_t norm = offset_of(p_.norms, at.b, at.h, at.s);
      if (p_.norms.dtype == Dtype::f32)
        next_.norm_bits = static_cast<const uint32_t*>(p_.norms.data)[norm];
      else
        next_.bfloat_bits = static_cast<const uint16_t*>(p_.norms.data)[norm];
    }
    for (int r = 0; r < 2; ++r) {
      const int64_t at = __shfl_sync(~0u, from, g() + 8 * r);
      const auto* row = static_cast<const uint8_t*>(p_.packed.data) + at + kPiece * t();
#pragma unroll
      for (int i = 0; i < kPieces; ++i)
        if (at >= 0 && (4 * kPiece * (i + 1) <= D / 2 || 4 * kPiece * i + kPiece * t() < D / 2))
          pieces_[i][r] = __ldg(reinterpret_cast<const Piece*>(row + 4 * kPiece * i));
    }
  }

  // What was fetched, as operand A.
  __device__ void take(uint32_t (&a)[kSteps][4], const Levels& levels) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t word =
            reinterpret_cast<const uint32_t*>(&pieces_[c / kWords][r])[c % kWords];
        place(a[2 * c], a[2 * c + 1], r,
              {levels.of(word, 0), levels.of(word, 1), levels.of(word, 2), levels.of(word, 3)});
      }
    const float norm =
        levels.unit() * (p_.norms.dtype == Dtype::f32
                             ? __uint_as_float(next_.norm_bits)
                             : __uint_as_float(static_cast<uint32_t>(next_.bfloat_bits) << 16));
    for (int r = 0; r < 2; ++r) {
      to_[r] = __shfl_sync(~0u, next_.x, g() + 8 * r);
      offset_[r] = __shfl_sync(~0u, next_.offset, g() + 8 * r);
      length_[r] = __shfl_sync(~0u, norm, g() + 8 * r);
    }
  }

  // The coordinate that comes at place i of the contraction; D or more: none. Of i = 8m + j it is
  // coordinate(8m) + coordinate(j).
  static __device__ unsigned coordinate(unsigned i) {
    const unsigned step = i / 16 % (kPiece / 2), group = i / 16 / (kPiece / 2);
    return group * 8 * kPiece + i % 8 / 2 * 2 * kPiece + step * 4 + i % 16 / 8 * 2 + i % 2;
  }
  // The coordinate in column n of the product: 8 adjacent ones of 32 to a thread.
  static __device__ unsigned column(unsigned n) { return adjacent_column<D, 32>(n); }

  // Stores up to 32 coordinates from first + 32i on, columns 32i and those after it of y.
  template <int i, int kY>
  __device__ void store(const float (&y)[kY], int first) const {
    constexpr int kHere = kY - 16 * i < 16 ? kY - 16 * i : 16;
    if constexpr (kHere > 0) {
      float x[kHere];
#pragma unroll
      for (int j = 0; j < kHere; ++j) x[j] = y[16 * i + j] * length_[j / 2 % 2];
      if (p_.offset)
#pragma unroll
        for (int j = 0; j < kHere; ++j) {
          const unsigned d = column(first + 32 * i + j / 4 * 8 + 2 * t() + j % 2);
          x[j] += load_element(p_.offset, offset_[j / 2 % 2] + d * p_.offset.stride[3]);
        }
      if (p_.x.dtype == Dtype::f16)
        store_pairs(x, first + 32 * i, half_pair);
      else
        store_pairs(x, first + 32 * i, bfloat_pair);
    }
  }

 private:
  static constexpr int kWords = kPiece / 4, kPieces = kChunks / kWords;
  using Piece =
      std::conditional_t<kPiece == 16, uint4, std::conditional_t<kPiece == 8, uint2, uint32_t>>;

  // What lane r knows of vector r. The bits of the norm are looked at when they have come.
  struct Row {
    int64_t x = -1;      // where it goes
    int64_t offset = 0;  // where its offset is
    uint32_t norm_bits = 0;
    uint16_t bfloat_bits = 0;
  };

  // The thread's coordinates of its two vectors, adjacent ones.
  template <int kX, class Pair>
  __device__ void store_pairs(const float (&x)[kX], int first, Pair pair) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (to_[r] < 0) continue;
      uint32_t out[kX / 4];
#pragma unroll
      for (int j = 0; j < kX / 4; ++j) out[j] = pair(x[4 * j + 2 * r], x[4 * j + 2 * r + 1]);
      auto* at = static_cast<uint16_t*>(p_.x.data) + to_[r] + first + kX / 2 * t();
      if constexpr (kX == 16)
        *reinterpret_cast<uint4*>(at) = {out[0], out[1], out[2], out[3]};
      else
        *reinterpret_cast<uint2*>(at) = {out[0], out[1]};
    }
  }

  Row next_;
  Piece pieces_[kPieces][2] = {};
  int64_t to_[2], offset_[2];
  float length_[2];  // times the unit of levels
};

}  // namespace tq::cuda
