// What the kernels of compress, decompress and update_ share: where vectors lie, which token wins a
// slot, and 16 vectors of 16-bit numbers as operand A of a tensor-core product.
//
// A warp takes 16 vectors. Lane r < 16 knows where vector r lies; thread (g, t) = (lane / 4,
// lane % 4) holds numbers of vectors g and g + 8, in the fragments of m16n8k16 (PTX ISA, "Matrix
// Fragments for mma.m16n8k16 with floating point type"). The order of a contraction is free: where
// fragments come straight from memory, step 2c + i contracts coordinates 4i .. 4i + 3 of the eight,
// 32c + 8t .. 32c + 8t + 7, that a 16-byte load brings (`place`).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstddef>

#include "codec_mma.cuh"
#include "device/element.cuh"
#include "kernels.h"
#include "prepare.h"
#include "tuned.h"

namespace tq::cuda {

// The keys and the values of one update, or one of them: equal in sizes and types.
struct CompressProblems {
  CompressProblem of[2];
};

constexpr int kRows = 16;  // vectors to a warp

TQ_HOST_DEVICE constexpr int chunks_of(int D) { return (D + 31) / 32; }

// Whether every row of a view can be read or written in pieces of `bytes`.
inline bool aligned_rows(const View& v, int64_t element_bytes, int64_t bytes) {
  bool aligned = reinterpret_cast<uintptr_t>(v.data) % bytes == 0 && v.stride[3] == 1;
  for (int i = 0; i < 3; ++i) aligned = aligned && v.stride[i] * element_bytes % bytes == 0;
  return aligned;
}

// Shared memory that a block of this device can have, in bytes.
inline int shared_limit() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// What codec_prepare.cu finds for the kernels of tiles, once instead of in each of their blocks.
struct Prepared {
  static constexpr int kShares = 32;
  uint32_t ascending[kShares];  // of every share of the slots: whether they ascend
  uint4 rotation[1];            // operand B in fp16, in the order of core_offset (codec_mma.cuh)
};
TQ_HOST_DEVICE constexpr int rotation_bytes(int D) { return D * 64 * chunks_of(D); }
constexpr int64_t prepared_bytes(int64_t D) {
  return static_cast<int64_t>(offsetof(Prepared, rotation)) + rotation_bytes(static_cast<int>(D));
}
cudaError_t launch_prepare_compress(const CompressProblem&, Prepared*, cudaStream_t);
cudaError_t launch_prepare_decompress(const DecompressProblem&, Prepared*, cudaStream_t);

// The kernels' choice, in the order of preference; compress.cu and decompress.cu. Those of tiles
// need a workspace (codec_prepare.cu).
cudaError_t launch_compress_few(const CompressProblems&, int count, cudaStream_t);
bool compress_tiles_fit(const CompressProblem&);
cudaError_t launch_compress_tiles(const CompressProblems&, int count, void* workspace,
                                  cudaStream_t);
cudaError_t launch_compress_general(const CompressProblems&, int count, cudaStream_t);
bool decompress_tiles_fit(const DecompressProblem&);
cudaError_t launch_decompress_tiles(const DecompressProblem&, void* workspace, cudaStream_t);
cudaError_t launch_decompress_general(const DecompressProblem&, cudaStream_t);

// ------------------------------------------------------------------------------------ places

// Division of numbers below 2^31 by one divisor, prepared on the host.
class Divider {
 public:
  explicit Divider(uint32_t divisor) : divisor_(divisor) {
    while (uint64_t{1} << shift_ < divisor) ++shift_;
    multiplier_ = static_cast<uint32_t>((((uint64_t{1} << shift_) - divisor) << 32) / divisor + 1);
  }
  __device__ uint32_t divide(uint32_t n) const { return (__umulhi(n, multiplier_) + n) >> shift_; }
  __device__ uint32_t rest(uint32_t n) const { return n - divide(n) * divisor_; }

 private:
  uint32_t divisor_, multiplier_, shift_ = 0;
};

// Vectors in the order b, h, s.
struct Order {
  Divider H, S;
  template <class Problem>
  explicit Order(const Problem& p) : H(static_cast<uint32_t>(p.H)), S(static_cast<uint32_t>(p.S)) {}
};

struct Position {
  int64_t b = 0, h = 0, s = 0;
  Position() = default;
  __device__ Position(int64_t vector, int64_t H, int64_t S)
      : b(vector / S / H), h(vector / S % H), s(vector % S) {}
  __device__ Position(uint32_t vector, const Order& order)
      : b(order.H.divide(order.S.divide(vector))),
        h(order.H.rest(order.S.divide(vector))),
        s(order.S.rest(vector)) {}
};

// The slot that a vector goes to, or -1: it goes nowhere.
__device__ inline int64_t slot_of(const CompressProblem& p, const Position& at) {
  const int64_t slot = p.slot ? p.slot.at(at.b, at.s) : at.s;
  return slot < p.capacity ? slot : -1;
}

// Whether a later token goes to the slot of this lane's vector (none: -1). Two warps may not both
// write it: one could win the bytes and the other the norm. By a whole warp, one vector at a time.
__device__ inline bool superseded(const CompressProblem& p, const Position& at, int64_t slot) {
  const int lane = threadIdx.x % 32;
  bool lost = false;
  for (unsigned waiting = __ballot_sync(~0u, slot >= 0); waiting != 0; waiting &= waiting - 1) {
    const int row = __ffs(waiting) - 1;
    const int64_t wanted = __shfl_sync(~0u, slot, row), b = __shfl_sync(~0u, at.b, row);
    bool found = false;
    for (int64_t s = __shfl_sync(~0u, at.s, row) + 1 + lane; s < p.S; s += 32)
      found |= p.slot.at(b, s) == wanted;
    if (__any_sync(~0u, found) && lane == row) lost = true;
  }
  return lost;
}

// ----------------------------------------------------------------------------------- tiles

// Warpgroups of a block of the kernels of tiles: as many as registers allow.
TQ_HOST_DEVICE constexpr int tile_groups(int D) { return D <= 128 ? 4 : D <= 256 ? 3 : 2; }

// A warp's 16 vectors of a tile, which is 64 for a warpgroup.
template <class Problem>
class TileRows {
 public:
  __device__ uint32_t tiles() const { return (vectors_ + 63) / 64; }

 protected:
  __device__ TileRows(const Problem& p, const Order& order)
      : p_(p), order_(order), vectors_(static_cast<uint32_t>(p.B * p.H * p.S)) {}

  // Where lane r's vector of a tile is, vector r; false: there is none.
  __device__ bool find(uint32_t tile, Position* at) const {
    const uint32_t vector = tile * 64 + threadIdx.x / 32 % 4 * kRows + lane();
    if (tile >= tiles() || lane() >= kRows || vector >= vectors_) return false;
    *at = Position(vector, order_);
    return true;
  }

  static __device__ int lane() { return threadIdx.x % 32; }
  static __device__ int g() { return lane() / 4; }
  static __device__ int t() { return lane() % 4; }

  const Problem& p_;

 private:
  const Order& order_;
  uint32_t vectors_;
};

// The coordinate in column n of a product, so that a thread's numbers are adjacent: of kWidth or
// fewer adjacent coordinates, columns 8j + 2t and 8j + 2t + 1 are number 2j and 2j + 1 of thread t.
template <int D, int kWidth>
__device__ unsigned adjacent_column(unsigned n) {
  const unsigned first = n / kWidth * kWidth, size = D - first < kWidth ? D - first : kWidth;
  return first + n % 8 / 2 * (size / 4) + n % kWidth / 8 * 2 + n % 2;
}

// f<N>(first) for the coordinates first .. first + N - 1, 64 at a time.
template <int D, class F>
__device__ void by_coordinates(F f) {
#pragma unroll 1
  for (int first = 0; first + 64 <= D; first += 64) f.template operator()<64>(first);
  if constexpr (D % 64 != 0) f.template operator()<D % 64>(D / 64 * 64);
}

// ------------------------------------------------------------------------- sixteen vectors

__device__ inline uint32_t half_pair(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ inline uint32_t bfloat_pair(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ inline float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// One 16-byte load of vector g (row 0) or g + 8 (row 1) into the fragments of its two steps.
__device__ inline void place(uint32_t (&first)[4], uint32_t (&second)[4], int row, uint4 x) {
  first[row] = x.x, first[row + 2] = x.y, second[row] = x.z, second[row + 2] = x.w;
}

// What is known of the thread's two vectors when they have become operand A.
struct Lengths {
  float norm[2];
  float inverse[2];  // y = inverse · (rotation · operand); 0 for a vector without direction
};

// |x|² of the thread's two vectors: the diagonal of a · aᵀ, for operand A's fragment of eight rows
// and columns is operand B's of eight columns.
template <class T, int kSteps>
__device__ void square_sums(const uint32_t (&a)[kSteps][4], float (&squares)[2]) {
  float low[4] = {}, high[4] = {};  // columns g, g + 8
#pragma unroll
  for (int i = 0; i < kSteps; ++i)
#pragma unroll
    for (int half = 0; half < 4; half += 2) {
      mma_k8<T>(low, a[i][half], a[i][half + 1], a[i][half]);
      mma_k8<T>(high, a[i][half], a[i][half + 1], a[i][half + 1]);
    }
  // Of vector g, lane 4g + g / 2 has column g.
  const int g = threadIdx.x % 32 / 4, from = 4 * g + g / 2;
  squares[0] = __shfl_sync(~0u, threadIdx.x / 4 % 2 ? low[1] : low[0], from);
  squares[1] = __shfl_sync(~0u, threadIdx.x / 4 % 2 ? high[3] : high[2], from);
}

// Finds the lengths of vectors of T and turns them into fp16. fp16 stays as it is. bfloat16 is
// multiplied by a power of two that makes the vector's length 2^14 to 2^15, on its bits: the
// exponents less one constant for the vector, two numbers at a time; what is below 2^-29 of the
// length vanishes. Zeros, infinities, NaN and bfloat16 lengths whose squares leave float32 are the
// rare branch: such vectors are brought near 1 first, and those without direction become 0.
template <class T, int kSteps>
__device__ Lengths normalise(uint32_t (&a)[kSteps][4]) {
  constexpr bool kIsHalf = std::is_same_v<T, __half>;
  float squares[2], rescue[2] = {1, 1}, restore[2] = {1, 1};
  square_sums<T>(a, squares);
  const auto ordinary = [](float x) { return x > 0x1p-100f && x < 0x1p100f; };
  const bool rare = !__all_sync(~0u, ordinary(squares[0]) && ordinary(squares[1]));
  if (!kIsHalf && rare) {
    for (int row = 0; row < 2; ++row) {
      if (ordinary(squares[row])) continue;
      rescue[row] = squares[row] < 1 ? 0x1p96f : 0x1p-96f;
      restore[row] = squares[row] < 1 ? 0x1p-96f : 0x1p96f;
    }
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        auto& pair = reinterpret_cast<__nv_bfloat162&>(a[i][j]);
        pair = __hmul2(pair, __float2bfloat162_rn(rescue[j % 2]));
      }
    square_sums<T>(a, squares);
  }

  Lengths lengths;
  // For both halves of a pair: the bits that become 0, and what makes them so after a shift by 3.
  uint32_t least[2], less[2];
  for (int row = 0; row < 2; ++row) {
    const float inverse = rsqrtf(squares[row]), norm = squares[row] * inverse;
    lengths.norm[row] = norm * restore[row];
    lengths.inverse[row] = inverse;
    if constexpr (!kIsHalf) {
      const uint32_t exponent = __float_as_uint(norm) >> 23;
      lengths.inverse[row] *= __uint_as_float((exponent - 14) << 23);
      // The length gets the exponent 127 + 14, and those of fp16 lie 112 lower.
      least[row] = (exponent - (127 + 14) + 112) * (0x00010001u << 7);
      less[row] = (127 + 14 - 112 - exponent) * (0x00010001u << 10);
    }
  }
  if (rare) {
    for (int row = 0; row < 2; ++row) {
      if (lengths.norm[row] > 0 && lengths.norm[row] < INFINITY) continue;
      // The root of 0 or infinity, or NaN.
      lengths.norm[row] = sqrtf(squares[row]) * restore[row];
      lengths.inverse[row] = 0;
      least[row] = less[row] = 0;
#pragma unroll
      for (int i = 0; i < kSteps; ++i) a[i][row] = a[i][row + 2] = 0;
    }
  }
  if constexpr (!kIsHalf) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t size = __vmaxu2(a[i][j] & 0x7fff7fff, least[j % 2]);
        a[i][j] = (a[i][j] & 0x80008000) | (size * 8 + less[j % 2]);
      }
  }
  return lengths;
}

template <int kSteps>
__device__ Lengths normalise(uint32_t (&a)[kSteps][4], Dtype dtype) {
  return dtype == Dtype::f16 ? normalise<__half>(a) : normalise<__nv_bfloat16>(a);
}

// The norm to store, from the sums of its policy: |ŷ|² and ⟨y, ŷ⟩.
__device__ inline float stored_norm(NormPolicy policy, float norm, float length, float product) {
  if (policy == NormPolicy::preserve) return norm / sqrtf(length);
  if (policy == NormPolicy::unbiased && product > 0) return norm / product;
  return norm;
}

}  // namespace tq::cuda
