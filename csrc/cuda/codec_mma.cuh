// The tensor-core product of the codec, y = a · bᵀ with fp16 operands and float32 sums: `a` 16 rows
// to a warp in registers, `b` resident in shared memory.
//
// b [n, k] lies in cores of 8 rows by 8 columns, 128 bytes each without gaps: the k/8 cores of 8
// rows one after another, then those of the next 8 rows. This is what `wgmma` calls K-major without
// swizzle (PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout"), and what ldmatrix
// reads without bank conflicts.
//
// On sm_90a four warps multiply together (m64nNk16, `a` from registers): the full rate of the
// tensor cores, and b is read once for 64 rows. Elsewhere each warp is on its own (m16n8k16). The
// fragments are the same: y[4j ..] are columns 8j + 2t, 8j + 2t + 1 of row g, then of row g + 8.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "device/ptx.cuh"

namespace tq::cuda {

// Where row n, column k of b lies, in bytes.
template <int K>
__device__ constexpr unsigned core_offset(unsigned n, unsigned k) {
  return n / 8 * 16 * K + k / 8 * 128 + n % 8 * 16 + k % 8 * 2;
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

// Half of a descriptor of b from shared address `b` on: the start, and that cores adjacent in k are
// 128 bytes apart. The other half: those adjacent in n are 16 K apart.
__device__ inline uint32_t describe(uint32_t b) { return (b & 0x3ffff) >> 4 | (128 >> 4) << 16; }

__device__ inline void wgmma(float (&y)[8], const uint32_t (&a)[4], uint32_t b, uint32_t stride,
                             int add) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, %14, 0;\nmov.b64 b, {%12, %13};\n"
      "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7}, "
      "{%8,%9,%10,%11}, b, p, 1, 1, 0;\n}\n"
      : "+f"(y[0]), "+f"(y[1]), "+f"(y[2]), "+f"(y[3]), "+f"(y[4]), "+f"(y[5]), "+f"(y[6]),
        "+f"(y[7])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(stride), "r"(add));
}
__device__ inline void wgmma(float (&y)[16], const uint32_t (&a)[4], uint32_t b, uint32_t stride,
                             int add) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, %22, 0;\nmov.b64 b, {%20, %21};\n"
      "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,"
      "%12,%13,%14,%15}, {%16,%17,%18,%19}, b, p, 1, 1, 0;\n}\n"
      : "+f"(y[0]), "+f"(y[1]), "+f"(y[2]), "+f"(y[3]), "+f"(y[4]), "+f"(y[5]), "+f"(y[6]),
        "+f"(y[7]), "+f"(y[8]), "+f"(y[9]), "+f"(y[10]), "+f"(y[11]), "+f"(y[12]), "+f"(y[13]),
        "+f"(y[14]), "+f"(y[15])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(stride), "r"(add));
}
__device__ inline void wgmma(float (&y)[32], const uint32_t (&a)[4], uint32_t b, uint32_t stride,
                             int add) {
  asm volatile(
      "{\n.reg .pred p;\n.reg .b64 b;\nsetp.ne.b32 p, %38, 0;\nmov.b64 b, {%36, %37};\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,"
      "%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
      "{%32,%33,%34,%35}, b, p, 1, 1, 0;\n}\n"
      : "+f"(y[0]), "+f"(y[1]), "+f"(y[2]), "+f"(y[3]), "+f"(y[4]), "+f"(y[5]), "+f"(y[6]),
        "+f"(y[7]), "+f"(y[8]), "+f"(y[9]), "+f"(y[10]), "+f"(y[11]), "+f"(y[12]), "+f"(y[13]),
        "+f"(y[14]), "+f"(y[15]), "+f"(y[16]), "+f"(y[17]), "+f"(y[18]), "+f"(y[19]), "+f"(y[20]),
        "+f"(y[21]), "+f"(y[22]), "+f"(y[23]), "+f"(y[24]), "+f"(y[25]), "+f"(y[26]), "+f"(y[27]),
        "+f"(y[28]), "+f"(y[29]), "+f"(y[30]), "+f"(y[31])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(stride), "r"(add));
}

// Starts y = a · bᵀ for the N = 2 kY rows of b from shared address `b` on. By four warps together.
// Neither y nor a may be touched before `finish`.
template <int kY, int kSteps>
__device__ void start(float (&y)[kY], const uint32_t (&a)[kSteps][4], uint32_t b) {
  const uint32_t first = uniform(describe(b));
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int i = 0; i < kSteps; ++i) wgmma(y, a[i], first + i * (256 >> 4), 16 * kSteps, i > 0);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

template <int kY>
__device__ void finish(float (&y)[kY]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < kY; ++i) asm volatile("" : "+f"(y[i]));  // not read before
}

// Bytes of b to shared memory, counted on a barrier. All blocks read them, over and over: they
// shall stay in the L2 (the policy that createpolicy makes of evict_last).
__device__ inline void copy_operand(uint32_t to, const void* from, uint32_t bytes,
                                    uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], "
      "%2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(0x14F0000000000000)
      : "memory");
}

#else

template <int kY, int kSteps>
__device__ void start(float (&y)[kY], const uint32_t (&a)[kSteps][4], uint32_t b) {
  // Lane l fetches row l % 8 of core l / 8 of 2 x 2: 16 rows of b by 16 columns.
  const int lane = threadIdx.x % 32;
  b += lane / 16 * (256 * kSteps) + lane / 8 % 2 * 128 + lane % 8 * 16;
#pragma unroll
  for (int i = 0; i < kY; ++i) y[i] = 0;
#pragma unroll
  for (int i = 0; i < kSteps; ++i)
#pragma unroll
    for (int j = 0; j < kY / 4; j += 2) {
      uint32_t r[4];
      load_matrices(r, b + j * (256 * kSteps) + i * 256);
      mma(reinterpret_cast<float (&)[4]>(y[4 * j]), a[i], r[0], r[1]);
      mma(reinterpret_cast<float (&)[4]>(y[4 * j + 4]), a[i], r[2], r[3]);
    }
}

template <int kY>
__device__ void finish(float (&)[kY]) {}

#endif

}  // namespace tq::cuda
