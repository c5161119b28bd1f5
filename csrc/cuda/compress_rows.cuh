// A warp's 16 vectors on their way through compress_tiles.cu.
//
//   fetch      cp.async of 16 bytes a lane, ahead of the work and into the warp's own place: no
//              barrier; pieces of rows are interchanged such that no access conflicts
//   take       as operand A (fragments: codec.cuh); squares on the tensor cores; fp16 operands,
//              scaled by a power of two per vector
//   encode     what the product with the rotation made of them, six instructions a coordinate
//   store      a nibble of each; the rotation's rows are ordered such that of 64 coordinates a
//              thread has 8 adjacent bytes of a vector and four threads write 32
#pragma once

#include "codec.cuh"

namespace tq::cuda {

// Indices by bins. The stretch of numbers around the boundaries is cut into 2^23 steps, of which
// the upper 5 bits are a bin. Lane i of a warp answers for bin i: how many boundaries lie below it,
// and at which step the one within lies. Both in one word, to which 32 times the number's own step
// is added: that of the boundary is stored such that the sum carries into the count, the upper 4
// bits, if the number lies beyond. Boundaries that share a bin are counted one by one.
class Encoder {
 public:
  __device__ explicit Encoder(const float* from) : boundaries_(from) {
    float boundary[kBoundaries];
    for (int i = 0; i < kBoundaries; ++i) boundary[i] = __ldg(from + i);
    const float margin = (boundary[kBoundaries - 1] - boundary[0]) / 64;
    const float low = boundary[0] - margin, high = boundary[kBoundaries - 1] + margin;
    scale_ = 1 / (high - low);
    shift_ = -low * scale_;
    int within = 0;
    entry_ = 0x10000000;  // cancels what the exponent of `steps` adds
    for (int i = 0; i < kBoundaries; ++i) {
      const uint32_t at = steps(boundary[i], scale_), bin = at >> 18 & 31;
      if (bin < threadIdx.x % 32) entry_ += 1 << 28;
      if (bin == threadIdx.x % 32) entry_ += (1 << 28) - 32 * (at + 1) % (1 << 28), ++within;
    }
    regular_ = __all_sync(~0u, within < 2 && scale_ > 0 && scale_ < 1e30f);
  }

  // In the nibbles of byte j, the indices of y[offset + 4j] and y[offset + 4j + 1], times
  // `inverse`.
  template <int kBytes, int kY>
  __device__ uint32_t word(const float (&y)[kY], int offset, float inverse) const {
    uint32_t found = 0;
    if (regular_) {
      const float factor = inverse * scale_;
#pragma unroll
      for (int j = kBytes - 1; j >= 0; --j)
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
          const uint32_t at = steps(y[offset + 4 * j + odd], factor);
          found = __funnelshift_l(at * 32 + __shfl_sync(~0u, entry_, at >> 18), found, 4);
        }
    } else {
#pragma unroll 1
      for (int i = 0; i < kBoundaries; ++i) {
        const float boundary = __ldg(boundaries_ + i);
#pragma unroll
        for (int j = 0; j < 2 * kBytes; ++j)
          if (y[offset + j / 2 * 4 + j % 2] * inverse > boundary) found += 1u << (4 * (j ^ 1));
      }
    }
    return found;
  }

 private:
  // In the lower 23 bits, at which step y · factor / scale lies; above them always the same.
  __device__ uint32_t steps(float y, float factor) const {
    return __float_as_uint(fmaf(__saturatef(fmaf(y, factor, shift_)), 1 - 0x1p-23f, 1.0f));
  }

  const float* boundaries_;
  float scale_, shift_;
  uint32_t entry_;
  bool regular_;
};

template <int D>
class Rows : public TileRows<CompressProblem> {
 public:
  static constexpr int kChunks = chunks_of(D), kSteps = 2 * kChunks;
  static constexpr int kRowBytes = 64 * kChunks;
  static constexpr int kBytes = kRows * kRowBytes;  // of shared memory, per warp

  // `fetched`: shared address of this warp's part, a multiple of 128.
  __device__ Rows(const CompressProblem& p, const Order& order, uint32_t fetched)
      : TileRows(p, order) {
    to_fetch_ = fetched + place_of(g(), t());
    to_take_ = fetched + place_of(lane() % 16, lane() / 16);
  }

  // The coordinate in column n of the product: 8 adjacent bytes of 64 coordinates to a thread.
  static __device__ unsigned column(unsigned n) { return adjacent_column<D, 64>(n); }

  // The tile that `fetch` brings from now on, and whose slots are asked for.
  __device__ void aim(uint32_t tile) {
    next_ = {};
    int64_t offset = -1;
    if (find(tile, &next_.at)) {
      next_.exists = true;
      if (p_.slot) next_.load_slot(p_.slot);
      offset = offset_of(p_.x, next_.at.b, next_.at.h, next_.at.s);
    }
    for (int r = 0; r < 2; ++r) {
      const int64_t mine = __shfl_sync(~0u, offset, g() + 8 * r);
      source_[r] = static_cast<const uint16_t*>(p_.x.data) + max(mine, int64_t{0}) + 8 * t();
      bytes_[r] = mine < 0 ? 0 : 16;
    }
  }

  // Coordinates 32c .. 32c + 31 of the tile aimed at: one cp.async for each of the thread's rows.
  __device__ void fetch(int c) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool inside = 32 * c + 32 <= D || 32 * c + 8 * t() < D;
      copy16_async(moved(to_fetch_, 4 * c) + r * 8 * kRowBytes, source_[r] + 32 * c,
                   inside ? bytes_[r] : 0);
    }
  }

  // What was fetched, once it has come, as operand A. The place is free for the next tile.
  __device__ void take(uint32_t (&a)[kSteps][4]) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kSteps; ++i) load_matrices(a[i], moved(to_take_, 2 * i));
    __syncwarp();
    lengths_ = normalise(a, p_.x.dtype);
    row_ = next_;
  }

  // Finds where the vectors taken go. `ascending`: no slot is wanted twice.
  __device__ void find_slots(bool ascending) {
    slot_ = row_.slot(p_);
    if (!ascending && superseded(p_, row_.at, slot_)) slot_ = -1;
    const int64_t bytes = slot_ < 0 ? -1 : offset_of(p_.packed, row_.at.b, row_.at.h, slot_);
    for (int r = 0; r < 2; ++r) {
      to_[r] = __shfl_sync(~0u, bytes, g() + 8 * r);
      length_[r] = product_[r] = 0;
    }
  }

  // The thread's bytes of up to 32 columns from 32i on, y before the lengths are undone, of row g
  // or g + 8 (r = 1). `level`: the centroid that this lane knows.
  template <int i, int kY>
  __device__ uint32_t encode(const Encoder& encoder, const float (&y)[kY], int r, float level) {
    constexpr int kHere = kY - 16 * i < 16 ? kY - 16 * i : 16;
    if constexpr (kHere <= 0) return 0;
    const float inverse = lengths_.inverse[r];
    const uint32_t word = encoder.word<kHere / 4>(y, 16 * i + 2 * r, inverse);
    if (p_.policy != NormPolicy::l2) {
#pragma unroll
      for (int j = 0; j < kHere / 2; ++j) {
        const uint32_t index = word >> (j / 2 * 8 + (j % 2 ? 0 : 4));
        const float rounded = __shfl_sync(~0u, level, index);
        const float exact = y[16 * i + j / 2 * 4 + 2 * r + j % 2] * inverse;
        length_[r] = fmaf(rounded, rounded, length_[r]);
        product_[r] = fmaf(rounded, exact, product_[r]);
      }
    }
    return word;
  }

  // Stores the thread's bytes, 8 kBytes coordinates of the vector together, `first` the first.
  template <int kBytes>
  __device__ void store(int first, int r, uint32_t word, uint32_t next_word = 0) const {
    if (to_[r] < 0) return;
    auto* at = static_cast<uint8_t*>(p_.packed.data) + to_[r] + first / 2 + kBytes * t();
    if constexpr (kBytes == 8)
      *reinterpret_cast<uint2*>(at) = {word, next_word};
    else if constexpr (kBytes == 4)
      *reinterpret_cast<uint32_t*>(at) = word;
    else
      *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(word);
  }

  // After all bytes.
  __device__ void store_norms() const {
    float norm[2];
    for (int r = 0; r < 2; ++r)
      norm[r] = p_.policy == NormPolicy::l2
                    ? lengths_.norm[r]
                    : stored_norm(p_.policy, lengths_.norm[r], quad_sum(length_[r]),
                                  quad_sum(product_[r]));
    const float low = __shfl_sync(~0u, norm[0], lane() % 8 * 4);
    const float high = __shfl_sync(~0u, norm[1], lane() % 8 * 4);
    if (slot_ >= 0)
      store_element(p_.norms, offset_of(p_.norms, row_.at.b, row_.at.h, slot_),
                    lane() < 8 ? low : high);
  }

 private:
  // Lane r's vector of a tile. The bits of its slot are looked at when they have come.
  struct Row {
    Position at;
    bool exists = false;
    uint32_t slot_bits[2] = {};

    __device__ void load_slot(const Integers& slots) {
      const int64_t i = at.b * slots.stride[0] + at.s * slots.stride[1];
      const auto* from = static_cast<const uint32_t*>(slots.data) + (slots.wide ? 2 * i : i);
      slot_bits[0] = from[0];
      if (slots.wide) slot_bits[1] = from[1];
    }
    __device__ int64_t slot(const CompressProblem& p) const {
      const int64_t wide = static_cast<int64_t>(slot_bits[1]) << 32 | slot_bits[0];
      const int64_t slot = !p.slot ? at.s : p.slot.wide ? wide : static_cast<int32_t>(slot_bits[0]);
      return exists && slot < p.capacity ? slot : -1;
    }
  };

  // A row is cut into pieces of 16 bytes. Piece i of row r lies where piece i ^ (r % 8) would, or
  // where rows begin at one of two banks (an odd number of chunks) i ^ (r / 2 % 4).
  static constexpr int kTurn = kChunks % 2 == 0 ? 8 : 4;
  static __device__ uint32_t place_of(int row, int piece) {
    return row * kRowBytes + (piece ^ (kTurn == 8 ? row % 8 : row / 2 % 4)) * 16;
  }
  // The place `by` pieces, a multiple of 2, further: an even piece of the first kTurn is at `from`.
  static __device__ uint32_t moved(uint32_t from, int by) {
    return (from ^ by % kTurn * 16) + by / kTurn * kTurn * 16;
  }

  uint32_t to_fetch_, to_take_;  // where the lane's first piece comes; which row's it loads
  const uint16_t* source_[2];    // where the thread's coordinates of chunk 0 lie
  int bytes_[2];                 // to copy at once: 16, or 0 if there is no such vector
  Row next_, row_;               // aimed at, taken
  Lengths lengths_;
  int64_t slot_;                  // lane r: of vector r; -1: it goes nowhere
  int64_t to_[2];                 // where bytes go
  float length_[2], product_[2];  // the thread's part of |ŷ|² and ⟨y, ŷ⟩
};

}  // namespace tq::cuda
