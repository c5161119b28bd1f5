// The rotation in shared memory, as operand B of the codec's products (codec_prepare.cu made it):
// all of it up to D = 256; for D = 512, 32 rows at a time, while others are in use.
#pragma once

#include "codec.cuh"

namespace tq::cuda {

// Up to D = 256: 64 rows to a product.
template <int D>
class ResidentRotation {
 public:
  static constexpr int kBytes = D * 64 * chunks_of(D);

  // By all threads of a block, after the kernel that prepares. What they wrote to shared memory
  // before is there for all, too.
  __device__ ResidentRotation(uint32_t shared, const Prepared* prepared) : shared_(shared) {
    for (int i = threadIdx.x; i < kBytes / 16; i += blockDim.x)
      copy16_async(shared + 16 * i, prepared->rotation + i, 16);
    copies_commit();
    copies_wait<0>();
    publish();
    __syncthreads();
  }

  // y = a · (rows first .. first + 2 kY - 1)ᵀ: its first half, then the second.
  template <int kY, int kSteps>
  __device__ void multiply_first_half(float (&y)[kY], const uint32_t (&a)[kSteps][4], int first) {
    start(y, a, shared_ + core_offset<32 * chunks_of(D)>(first, 0));
    finish<0>(y);
  }
  template <int kY>
  __device__ void multiply_second_half(float (&)[kY]) {}
  __device__ void end() {}

 private:
  uint32_t shared_;
};

// D = 512: a ring of three places of 32 rows; two for products under way, one being filled. All
// threads of a block ask for the same rows in the same order, round and round.
template <int D>
class StreamedRotation {
 public:
  static constexpr int kBytes = 3 * 64 * D + 128;

  // As above.
  __device__ StreamedRotation(uint32_t shared, const Prepared* prepared)
      : shared_(shared), rotation_(prepared->rotation) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if (threadIdx.x == 0) {
      for (int i = 0; i < 3; ++i) barrier_init(barrier(i), 1);
      barrier_init_fence();
    }
#endif
    __syncthreads();
    fill(0, 0);
  }

  // y = a · (rows first .. first + 63)ᵀ: its first half, while the second is multiplied, then that.
  template <int kSteps>
  __device__ void multiply_first_half(float (&y)[32], const uint32_t (&a)[kSteps][4], int first) {
    start(half(y, 0), a, rows(first));
    start(half(y, 1), a, rows(first + 32));
    finish<1>(half(y, 0));
  }
  __device__ void multiply_second_half(float (&y)[32]) { finish<0>(half(y, 1)); }

  // Before the block ends: rows are still under way.
  __device__ void end() { wait(); }

 private:
  static constexpr int kPlace = 64 * D;

  static __device__ float (&half(float (&y)[32], int i))[16] {
    return reinterpret_cast<float (&)[16]>(y[16 * i]);
  }

  // Where 32 rows are. The products before the last are finished: the place of one takes the rows
  // that follow.
  __device__ uint32_t rows(int first) {
    const uint32_t here = shared_ + place_ * kPlace;
    wait();
    __syncthreads();
    if (++place_ == 3) place_ = 0, ++round_;
    fill(place_, (first + 32) % D);
    return here;
  }

  __device__ void fill(int place, int first) {
    const uint32_t to = shared_ + place * kPlace;
    const uint4* from = rotation_ + first * (D / 8);
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    if (threadIdx.x == 0) {
      barrier_expect(barrier(place), kPlace);
      copy_bulk(to, from, kPlace, barrier(place));
    }
#else
    for (int i = threadIdx.x; i < kPlace / 16; i += blockDim.x)
      copy16_async(to + 16 * i, from + i, 16);
    copies_commit();
#endif
  }

  // For the rows at place_.
  __device__ void wait() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    barrier_wait(barrier(place_), round_ & 1);
#else
    copies_wait<0>();
#endif
  }

  __device__ uint32_t barrier(int place) const { return shared_ + 3 * kPlace + 8 * place; }

  uint32_t shared_;
  const uint4* rotation_;
  int place_ = 0, round_ = 0;
};

template <int D>
using Rotation = std::conditional_t<D <= 256, ResidentRotation<D>, StreamedRotation<D>>;

}  // namespace tq::cuda
