// What the kernels of compress, decompress and update_ share: where vectors lie, which token wins a
// slot, and 16 vectors of 16-bit numbers as operand A of a tensor-core product.
//
// A warp takes 16 vectors. Lane r < 16 knows where vector r lies; thread (g, t) = (lane / 4,
// lane % 4) holds coordinates 32c + 8t .. 32c + 8t + 7 of vectors g and g + 8, for every chunk c of
// 32, as one 16-byte load brings them. The order of a contraction is free, so that load is two
// fragments of m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"):
// step 2c + i contracts coordinates 4i .. 4i + 3 of each thread's eight, and a matrix multiplied
// with it has its columns in the same order (`coordinate`).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

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

// The kernels' choice, in the order of preference; compress.cu and decompress.cu.
cudaError_t launch_compress_few(const CompressProblems&, int count, cudaStream_t);
bool compress_tiles_fit(const CompressProblem&);
cudaError_t launch_compress_tiles(const CompressProblems&, int count, cudaStream_t);
cudaError_t launch_compress_general(const CompressProblems&, int count, cudaStream_t);
bool decompress_tiles_fit(const DecompressProblem&);
cudaError_t launch_decompress_tiles(const DecompressProblem&, cudaStream_t);
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

// store(i, load(i)) for i = first, first + step, ... below end, with kBatch loads under way at a
// time.
template <int kBatch, class Load, class Store>
__device__ void in_batches(unsigned first, unsigned end, unsigned step, Load load, Store store) {
  for (unsigned i = first; i < end; i += kBatch * step) {
    decltype(load(i)) loaded[kBatch];
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (i + b * step < end) loaded[b] = load(i + b * step);
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      if (i + b * step < end) store(i + b * step, loaded[b]);
  }
}

// This thread's share of whether slots ascend, after those to be skipped: then no token supersedes
// another.
template <class Int>
__device__ bool ascend(const Int* slots, int64_t stride, unsigned count) {
  bool all = true;
  struct Two {
    Int before, after;
  };
  in_batches<8>(
      threadIdx.x + 1, count, blockDim.x,
      [&](unsigned s) { return Two{slots[(s - 1) * stride], slots[s * stride]}; },
      [&](unsigned, Two slot) {
        all &= (slot.before < slot.after) | ((slot.before < 0) & (slot.after < 0));
      });
  return all;
}

// ------------------------------------------------------------------------- sixteen vectors

// The coordinate that comes at place 8i of the contraction; those after it are 1, 8, 9, 16, 17, 24
// and 25 higher.
__device__ inline unsigned coordinate(unsigned i) { return i / 4 * 32 + i / 2 % 2 * 4 + i % 2 * 2; }

template <class T>
__device__ void mma_of(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>)
    mma(c, a, b0, b1);
  else
    mma_bf16(c, a, b0, b1);
}

__device__ inline uint32_t half_pair(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32_t*>(&pair);
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
// is operand B's of eight columns.
template <class T, int kSteps>
__device__ void square_sums(const uint32_t (&a)[kSteps][4], float (&squares)[2]) {
  float low[4] = {}, high[4] = {};  // columns g, g + 8
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    mma_of<T>(low, a[i], a[i][0], a[i][2]);
    mma_of<T>(high, a[i], a[i][1], a[i][3]);
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
