// The emulator's stand-in for csrc/cuda/device/ptx.cuh: the same functions, without assembly.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

namespace tq::cuda {

inline float exp2_fast(float x) { return emu::ftz(exp2f(emu::ftz(x))); }
inline uint32_t as_bits(__half2 x) { return emu::bits<uint32_t>(x); }
inline __half2 as_half2(uint32_t x) { return emu::bits<__half2>(x); }

// Checks that it is the same in all lanes.
inline __attribute__((always_inline)) int uniform(int x) {
  const uint32_t any = __reduce_or_sync(~0u, static_cast<uint32_t>(x)),
                 all = __reduce_and_sync(~0u, static_cast<uint32_t>(x));
  if (any != all) emu::warning("uniform(): %d, but not in all lanes", x);
  return static_cast<int>(any);
}
inline int keep(int x) { return x; }
struct Thread {
  int x = threadIdx.x, warp = x / 32, lane = x % 32, g = lane / 4, t = lane % 4;
};
inline uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
  return (a & mask) | (b & ~mask);
}
// The machine always elects the same lane, but which one is not specified.
inline __attribute__((always_inline)) bool elect_one() {
  __syncwarp();
#if __CUDA_ARCH__ >= 900
  return emu::lane() == 13;
#else
  return emu::lane() == 0;
#endif
}

inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emu::mma_f16(c, a, b0, b1);
}
template <class T>
void mma_k8(float (&c)[4], uint32_t low, uint32_t high, uint32_t b) {
  if constexpr (std::is_same_v<T, __half>)
    emu::mma_f16(c, {low, high, 0, 0}, b, 0);
  else
    emu::mma_bf16_k8(c, low, high, b);
}
inline void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1) {
  emu::mma_tf32(c, a, b0, b1);
}
inline float tf32_part(float x) { return __uint_as_float(__float_as_uint(x) & 0xFFFFE000); }
inline void load_matrices(uint32_t (&x)[4], uint32_t row) { emu::load_matrices(x, row, false); }
inline void load_transposed(uint32_t (&x)[4], uint32_t row) { emu::load_matrices(x, row, true); }
inline uint32_t transpose8x8(uint32_t x) { return emu::transpose8x8(x); }

inline uint32_t shared_address(const void* p) { return emu::shared_offset(p); }
inline uint32_t load_shared(uint32_t address) {
  return *reinterpret_cast<const uint32_t*>(emu::shared_pointer(address));
}
inline float2 load_shared2(uint32_t address) {
  return *reinterpret_cast<const float2*>(emu::shared_pointer(address));
}
template <int kWords>
void load_words(uint32_t (&x)[kWords], uint32_t address) {
  if (address % sizeof x) emu::error("load_words: %#x is not aligned to %zu", address, sizeof x);
  memcpy(x, emu::shared_pointer(address), sizeof x);
}
inline void store_shared(uint32_t address, uint32_t x) {
  *reinterpret_cast<uint32_t*>(emu::shared_pointer(address)) = x;
}
inline void store_shared4(uint32_t address, const uint32_t (&x)[4]) {
  if (address % sizeof x) emu::error("store_shared4: %#x is not aligned to 16", address);
  memcpy(emu::shared_pointer(address), x, sizeof x);
}
inline __attribute__((always_inline)) void meet(int number, int threads) {
  emu::block_barrier(number, threads, "meet");
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  emu::mbarrier_init(barrier, arrivals);
}
inline void barrier_init_fence() {}
inline void barrier_arrive(uint32_t barrier, uint32_t times = 1) {
  emu::mbarrier_arrive(barrier, times, 0);
}
inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
  emu::mbarrier_arrive(barrier, 1, bytes);
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) { emu::mbarrier_wait(barrier, parity); }
inline void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  emu::copy_bulk(to, from, bytes, barrier);
}
#else  // declared only, as for the compiler
void barrier_init(uint32_t barrier, uint32_t arrivals);
void barrier_init_fence();
void barrier_arrive(uint32_t barrier, uint32_t times = 1);
void barrier_expect(uint32_t barrier, uint32_t bytes);
void barrier_wait(uint32_t barrier, uint32_t parity);
void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier);
#endif

// Only declared: the kernels that use them are not emulated.
void store_bulk(void* to, uint32_t from, uint32_t bytes);
void bulk_stores_commit();
template <int kPending>
void bulk_stores_wait();

inline void copy16_async(uint32_t to, const void* from, int bytes) {
  emu::copy_async(to, from, 16, bytes < 0 ? 16 : bytes > 16 ? 0 : 16 - bytes);
}
inline void copy8_async(uint32_t to, const void* from, bool all) {
  emu::copy_async(to, from, 8, all ? 0 : 8);
}
inline void copies_commit() { emu::copies_commit(); }
template <int kPending>
inline void copies_wait() {
  emu::copies_wait(kPending);
}

inline void allow_next_kernel() {}
inline void prefetch(const void*) {}
inline void wait_for_previous_kernel() {}

inline void fence_for_async() {}

inline unsigned long long load_anew(const unsigned long long* p) {
  emu::poll();
  return *p;
}
inline float4 load_word(const float4* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) emu::error("load_word: %p is not aligned to 16", p);
  emu::poll();
  return *p;
}
inline void store_word(float4* p, float4 v) {
  if (reinterpret_cast<uintptr_t>(p) % 16) emu::error("store_word: %p is not aligned to 16", p);
  *p = v;
  emu::touch();
}
inline void store_to_stay(float4* p, float4 v) { *p = v; }

}  // namespace tq::cuda
