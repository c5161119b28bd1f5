// The rotation in shared memory, as operand B of the codec's products (codec_prepare.cu made it):
// all of it up to D = 256; for D = 512, 32 rows at a time, while others are in use.
#pragma once

#include "codec.cuh"

namespace tq::cuda {

#ifndef __CUDA_ARCH_FEAT_SM90_ALL
// By all threads of a block: a group of copies (device/ptx.cuh).
__device__ inline void copy_rotation(uint32_t to, const uint4* from, int bytes) {
  for (int i = threadIdx.x; i < bytes / 16; i += blockDim.x)
    copy16_async(to + 16 * i, from + i, 16);
  copies_commit();
}
#endif

// Up to D = 256: 64 rows to a product.
template <int D>
class ResidentRotation {
 public:
  static constexpr bool kStreams = false;
  static constexpr int kBytes = rotation_bytes(D) + 128;

  // By all threads of a block, after the kernel that prepares. What they wrote to shared memory
  // before is there for all, too.
  __device__ ResidentRotation(uint32_t shared, const Prepared* prepared) : shared_(shared) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    const uint32_t full = shared + kBytes - 128;
    if (threadIdx.x == 0) {
      barrier_init(full, 1);
      barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x == 0) {
      barrier_expect(full, kBytes - 128);
      copy_operand(shared, prepared->rotation, kBytes - 128, full);
    }
    barrier_wait(full, 0);
#else
    copy_rotation(shared, prepared->rotation, kBytes - 128);
    copies_wait<0>();
    __syncthreads();
#endif
  }

  // y = a · (rows first .. first + 2 kY - 1)ᵀ: its first half, then the second.
  template <int kY, int kSteps>
  __device__ void multiply_first(float (&y)[kY], const uint32_t (&a)[kSteps][4], int first) {
    start(y, a, shared_ + core_offset<32 * chunks_of(D)>(first, 0));
    finish(y);
  }
  template <int kY, int kSteps>
  __device__ void multiply_second(float (&)[kY], const uint32_t (&)[kSteps][4], int) {}
  __device__ void end() {}

 private:
  uint32_t shared_;
};

// D = 512: a ring of three places of 32 rows. All warps multiply with the same rows in the same
// order, round and round. A place is filled again when all are done with it, which the first
// thread sees to: two warpgroups take turns, one multiplies while the other uses its result.
template <int D>
class StreamedRotation {
 public:
  static constexpr bool kStreams = true;
  static constexpr int kPlace = 64 * D, kPlaces = 3;
  static constexpr int kBytes = kPlaces * kPlace + 128;

  // As above.
  __device__ StreamedRotation(uint32_t shared, const Prepared* prepared)
      : shared_(shared), rotation_(prepared->rotation) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if (threadIdx.x == 0) {
      for (int i = 0; i < kPlaces; ++i) {
        barrier_init(full(i), 1);
        barrier_init(free(i), blockDim.x / 32);
      }
      barrier_init_fence();
    }
#endif
    __syncthreads();
    fill(0, 0);
    fill(1, 32);
  }

  template <int kSteps>
  __device__ void multiply_first(float (&y)[32], const uint32_t (&a)[kSteps][4], int first) {
    multiply(reinterpret_cast<float (&)[16]>(y[0]), a, first);
  }
  template <int kSteps>
  __device__ void multiply_second(float (&y)[32], const uint32_t (&a)[kSteps][4], int first) {
    multiply(reinterpret_cast<float (&)[16]>(y[16]), a, first + 32);
  }

  // Before the block ends: rows are still under way.
  __device__ void end() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    for (int i = 0; i < 2; ++i, advance()) barrier_wait(full(place_), round_ & 1);
#else
    copies_wait<0>();
#endif
  }

 private:
  // y = a · (32 rows)ᵀ. Meanwhile the rows after the next are sent for, to the place before.
  template <int kSteps>
  __device__ void multiply(float (&y)[16], const uint32_t (&a)[kSteps][4], int first) {
    const int before = place_ == 0 ? kPlaces - 1 : place_ - 1, next = (first + 64) % D;
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    barrier_wait(full(place_), round_ & 1);
    start(y, a, shared_ + place_ * kPlace);
    if (threadIdx.x == 0) {
      const int uses = place_ == 0 ? round_ : round_ + 1;  // of that place, so far
      if (uses > 0) barrier_wait(free(before), (uses - 1) & 1);
      fill(before, next);
    }
    finish(y);
    if (threadIdx.x % 32 == 0) barrier_arrive(free(place_));
#else
    copies_wait<0>();
    __syncthreads();
    fill(before, next);
    start(y, a, shared_ + place_ * kPlace);
#endif
    advance();
  }

  __device__ void fill(int place, int first) {
    const uint32_t to = shared_ + place * kPlace;
    const uint4* from = rotation_ + first * (D / 8);
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if (threadIdx.x == 0) {
      barrier_expect(full(place), kPlace);
      copy_operand(to, from, kPlace, full(place));
    }
#else
    copy_rotation(to, from, kPlace);
#endif
  }

  __device__ void advance() {
    if (++place_ == kPlaces) place_ = 0, ++round_;
  }

  // Barriers: a place is full, all warps are done with it.
  __device__ uint32_t full(int place) const { return shared_ + kPlaces * kPlace + 16 * place; }
  __device__ uint32_t free(int place) const { return full(place) + 8; }

  uint32_t shared_;
  const uint4* rotation_;
  int place_ = 0, round_ = 0;
};

template <int D>
using Rotation = std::conditional_t<D <= 256, ResidentRotation<D>, StreamedRotation<D>>;

}  // namespace tq::cuda
