// The machine's instructions that C++ has no words for, one function each. PTX ISA sections are
// named where a layout matters. (What only the codec uses is in codec_mma.cuh.)
#pragma once

#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace tq::cuda {

// ---------------------------------------------------------------------------------- arithmetic

__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline uint32_t as_bits(__half2 x) { return *reinterpret_cast<uint32_t*>(&x); }
__device__ inline __half2 as_half2(uint32_t x) { return *reinterpret_cast<__half2*>(&x); }

// The same number, known to be the same in all lanes of the warp: instructions that take only
// uniform operands, such as bulk copies, are then issued once, not in a loop over the lanes.
__device__ inline int uniform(int x) { return __reduce_or_sync(~0u, x); }

// Hides where x comes from, so that it is kept in a register and not computed again.
__device__ inline int keep(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// threadIdx.x, read anew, and what a fragment's lanes are named by. What is computed from it is not
// kept in registers while other code runs, as the compiler does with what never changes.
struct Thread {
  int x, warp, lane, g, t;

  __device__ Thread() {
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    warp = x / 32, lane = x % 32, g = lane / 4, t = lane % 4;
  }
};

// Bits of a where the mask has ones, of b elsewhere.
__device__ inline uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t c;
  asm("lop3.b32 %0, %1, %2, %3, 0xE4;" : "=r"(c) : "r"(a), "r"(b), "r"(mask));
  return c;
}

// True in one lane of a warp that is all together; the compiler knows that it is one.
__device__ inline bool elect_one() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  uint32_t elected;
  asm volatile(
      "{\n.reg .pred p;\n"
      "elect.sync _|p, 0xFFFFFFFF;\n"
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(elected));
  return elected;
#else
  return threadIdx.x % 32 == 0;
#endif
}

// ------------------------------------------------------------------------------- matrix products
// c += a · b, "mma.m16n8k16" and "mma.m16n8k8" in the PTX ISA. With g = lane / 4 and t = lane % 4:
//   a: rows g, g + 8, columns 2t, 2t + 1, then the same rows, columns 2t + 8, 2t + 9
//   b: rows 2t, 2t + 1, then 2t + 8, 2t + 9, of column g
//   c: row g, columns 2t, 2t + 1, then row g + 8

__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same for 8 columns of a, of fp16 or bf16: `low` rows g, `high` rows g + 8; b column g.
template <class T>
__device__ inline void mma_k8(float (&c)[4], uint32_t low, uint32_t high, uint32_t b) {
  if constexpr (std::is_same_v<T, __half>)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(low), "r"(high), "r"(b));
  else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(low), "r"(high), "r"(b));
}

// The same for tf32, eight columns of a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); rows t and
// t + 4 of b. The low 13 bits of an operand are ignored.
__device__ inline void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}

// The part of a number that tf32 keeps.
__device__ inline float tf32_part(float x) {
  return __uint_as_float(__float_as_uint(x) & 0xFFFFE000);
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory; lane l says where row l % 8 of matrix
// l / 8 lies.
__device__ inline void load_matrices(uint32_t (&x)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}

// The same, each matrix transposed.
__device__ inline void load_transposed(uint32_t (&x)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}

// The transpose of an 8 x 8 matrix of 16-bit numbers, of which each lane holds row g, columns 2t
// and 2t + 1.
__device__ inline uint32_t transpose8x8(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// ------------------------------------------------------------------------------- shared memory

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ inline uint32_t load_shared(uint32_t address) {
  uint32_t x;
  asm("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address));
  return x;
}

__device__ inline float2 load_shared2(uint32_t address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}
template <int kWords>
__device__ inline void load_words(uint32_t (&x)[kWords], uint32_t address) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
  if constexpr (kWords == 1)
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x[0]) : "r"(address) : "memory");
  else if constexpr (kWords == 4)
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  else
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(x[0]), "=r"(x[1])
                 : "r"(address)
                 : "memory");
}

__device__ inline void store_shared(uint32_t address, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}
__device__ inline void store_shared4(uint32_t address, const uint32_t (&x)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3])
               : "memory");
}

// Barrier `number`, 1 to 15, of a block: until so many threads, whole warps, have arrived.
__device__ inline void meet(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// ----------------------------------------------------------------------------- asynchronous copies
// Hopper and later: a copy engine that fills shared memory and counts the bytes on a barrier. Only
// declared for older architectures, whose kernels do not use it.

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes initialised barriers known to the copy engine.
__device__ inline void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ inline void barrier_arrive(uint32_t barrier, uint32_t times = 1) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(times)
               : "memory");
}

// Arrive, and expect this many bytes before the phase is over.
__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}

__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

// Orders accesses to shared memory, this thread's own and those that it has learned of by a
// barrier, before later ones of the asynchronous kind: bulk copies and the products of wgmma.
__device__ inline void fence_for_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// `bytes` and both addresses are multiples of 16. What is read once shall not push other data out
// of the L2: hence the policy, the value that createpolicy makes of evict_first.
__device__ inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], "
      "%2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(0x12F0000000000000)
      : "memory");
}

// The other way, in groups that complete in order: `bulk_stores_wait` until no more than kPending
// still read shared memory. fence_for_async() and a barrier come before.
__device__ inline void store_bulk(void* to, uint32_t from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from),
               "r"(bytes)
               : "memory");
}
__device__ inline void bulk_stores_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int kPending>
__device__ inline void bulk_stores_wait() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
#else
__device__ void barrier_init(uint32_t barrier, uint32_t arrivals);
__device__ void barrier_init_fence();
__device__ void barrier_arrive(uint32_t barrier, uint32_t times = 1);
__device__ void barrier_expect(uint32_t barrier, uint32_t bytes);
__device__ void barrier_wait(uint32_t barrier, uint32_t parity);
__device__ void fence_for_async();
__device__ void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier);
__device__ void store_bulk(void* to, uint32_t from, uint32_t bytes);
__device__ void bulk_stores_commit();
template <int kPending>
__device__ void bulk_stores_wait();
#endif

// Every lane copies 16 bytes at a time, in groups that complete in order. Of the source only
// `bytes` are read, if they are fewer; the rest becomes zero.

__device__ inline void copy16_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(min(max(bytes, 0), 16))
               : "memory");
}

// The same for 8 bytes, which go through the L1: all of them, or zeros.
__device__ inline void copy8_async(uint32_t to, const void* from, bool all) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(all ? 8 : 0)
               : "memory");
}

__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until no more than `kPending` groups are under way.
template <int kPending>
__device__ inline void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Brings the place into the L2, soon. Changes nothing else: it need not be readable yet.
__device__ inline void prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}

// ------------------------------------------------------------------ kernels one after the other
// Programmatic dependent launch: the next kernel may start now; wait for the one before.

__device__ inline void allow_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ inline void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// -------------------------------------------------------------- words that blocks exchange

// What another block may have changed meanwhile.
__device__ inline unsigned long long load_anew(const unsigned long long* p) {
  return *static_cast<const volatile unsigned long long*>(p);
}

// 16 bytes that are seen all or not at all: one scalar in the memory model (PTX ISA, ld and
// st, .b128).

__device__ inline float4 load_word(const float4* p) {
  uint64_t low, high;
  asm volatile(
      "{\n.reg .b128 v;\n"
      "ld.relaxed.gpu.global.b128 v, [%2];\n"
      "mov.b128 {%0, %1}, v;\n}"
      : "=l"(low), "=l"(high)
      : "l"(p)
      : "memory");
  return {__uint_as_float(static_cast<uint32_t>(low)),
          __uint_as_float(static_cast<uint32_t>(low >> 32)),
          __uint_as_float(static_cast<uint32_t>(high)),
          __uint_as_float(static_cast<uint32_t>(high >> 32))};
}

__device__ inline void store_word(float4* p, float4 v) {
  const uint64_t low = __float_as_uint(v.x) | static_cast<uint64_t>(__float_as_uint(v.y)) << 32;
  const uint64_t high = __float_as_uint(v.z) | static_cast<uint64_t>(__float_as_uint(v.w)) << 32;
  asm volatile(
      "{\n.reg .b128 v;\n"
      "mov.b128 v, {%1, %2};\n"
      "st.relaxed.gpu.global.b128 [%0], v;\n}" ::"l"(p),
      "l"(low), "l"(high)
      : "memory");
}

// A store whose place shall stay in the L2 although much else goes through it (the value that
// createpolicy makes of evict_last).
__device__ inline void store_to_stay(float4* p, float4 v) {
  asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(p), "f"(v.x),
               "f"(v.y), "f"(v.z), "f"(v.w), "l"(0x14F0000000000000)
               : "memory");
}

}  // namespace tq::cuda
