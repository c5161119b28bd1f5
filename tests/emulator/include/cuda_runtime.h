// Fake: what device code sees.
#pragma once
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <assert.h>

#include <algorithm>
#include <cmath>

#include "cuda_runtime_api.h"

#ifndef __CUDACC__
#define __CUDACC__
#endif
#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))
#define EMU_NOINLINE __attribute__((noinline))
#if defined EMU_DEVICE && !defined(__CUDA_ARCH__)
#define __CUDA_ARCH__ EMU_ARCH
#endif

// ------------------------------------------------------------------------------- vector types
#define EMU_VECTORS(T, name, a2, a4)                                                        \
  struct name##1 { T x; };                                                                  \
  struct alignas(a2) name##2 { T x, y; };                                                   \
  struct name##3 { T x, y, z; };                                                            \
  struct alignas(a4) name##4 { T x, y, z, w; };                                             \
  inline constexpr name##2 make_##name##2(T x, T y) { return {x, y}; }                      \
  inline constexpr name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }              \
  inline constexpr name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMU_VECTORS(signed char, char, 2, 4)
EMU_VECTORS(unsigned char, uchar, 2, 4)
EMU_VECTORS(short, short, 4, 8)
EMU_VECTORS(unsigned short, ushort, 4, 8)
EMU_VECTORS(int, int, 8, 16)
EMU_VECTORS(long, long, 16, 16)
EMU_VECTORS(unsigned long, ulong, 16, 16)
EMU_VECTORS(long long, longlong, 16, 16)
EMU_VECTORS(unsigned long long, ulonglong, 16, 16)
EMU_VECTORS(float, float, 8, 16)
EMU_VECTORS(double, double, 16, 16)
struct uint1 { unsigned x; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
inline constexpr uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline constexpr uint3 make_uint3(unsigned x, unsigned y, unsigned z) { return {x, y, z}; }
inline constexpr uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// ---------------------------------------------------------------------------------- min, max
#define EMU_MINMAX(T)                                     \
  inline constexpr T min(T a, T b) { return a < b ? a : b; } \
  inline constexpr T max(T a, T b) { return a > b ? a : b; }
EMU_MINMAX(int)
EMU_MINMAX(unsigned)
EMU_MINMAX(long)
EMU_MINMAX(unsigned long)
EMU_MINMAX(long long)
EMU_MINMAX(unsigned long long)
#undef EMU_MINMAX
#define EMU_MINMAX2(T, U, R)                                                              \
  inline constexpr R min(T a, U b) { return min(static_cast<R>(a), static_cast<R>(b)); }  \
  inline constexpr R max(T a, U b) { return max(static_cast<R>(a), static_cast<R>(b)); }  \
  inline constexpr R min(U a, T b) { return min(static_cast<R>(a), static_cast<R>(b)); }  \
  inline constexpr R max(U a, T b) { return max(static_cast<R>(a), static_cast<R>(b)); }
EMU_MINMAX2(int, unsigned, unsigned)
EMU_MINMAX2(long, unsigned long, unsigned long)
EMU_MINMAX2(long long, unsigned long long, unsigned long long)
#undef EMU_MINMAX2
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
inline double min(float a, double b) { return fmin(a, b); }
inline double max(float a, double b) { return fmax(a, b); }
inline double min(double a, float b) { return fmin(a, b); }
inline double max(double a, float b) { return fmax(a, b); }

// ---------------------------------------------------------------------------------- numbers
namespace emu {
template <class To, class From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}
inline float ftz(float x) { return fabsf(x) < 1.17549435e-38f ? copysignf(0.0f, x) : x; }
template <class T>
inline T clamp_to(double x) {
  if (x != x) return 0;
  const double low = static_cast<double>(std::numeric_limits<T>::lowest()), high = static_cast<double>(std::numeric_limits<T>::max());
  return x <= low ? std::numeric_limits<T>::lowest() : x >= high ? std::numeric_limits<T>::max() : static_cast<T>(x);
}
}  // namespace emu
inline unsigned __float_as_uint(float x) { return emu::bits<unsigned>(x); }
inline int __float_as_int(float x) { return emu::bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emu::bits<float>(x); }
inline float __int_as_float(int x) { return emu::bits<float>(x); }
inline long long __double_as_longlong(double x) { return emu::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emu::bits<double>(x); }
inline float rsqrtf(float x) { return static_cast<float>(1 / sqrt(static_cast<double>(x))); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
inline float rcbrtf(float x) { return 1 / cbrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __tanhf(float x) { return tanhf(x); }
inline float __saturatef(float x) { return x > 1 ? 1 : x > 0 ? x : 0; }
inline float __fdividef(float x, float y) { return fabsf(y) > 8.507e37f ? (fabsf(x) < INFINITY ? 0.0f : NAN) : x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { volatile float p = x * y; return p; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline int __float2int_rn(float x) { return emu::clamp_to<int>(nearbyint(x)); }
inline int __float2int_rz(float x) { return emu::clamp_to<int>(trunc(x)); }
inline int __float2int_rd(float x) { return emu::clamp_to<int>(floor(x)); }
inline int __float2int_ru(float x) { return emu::clamp_to<int>(ceil(x)); }
inline unsigned __float2uint_rn(float x) { return emu::clamp_to<unsigned>(nearbyint(x)); }
inline unsigned __float2uint_rz(float x) { return emu::clamp_to<unsigned>(trunc(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __ll2float_rn(long long x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned y = 0;
  for (int i = 0; i < 32; ++i) y |= (x >> i & 1) << (31 - i);
  return y;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return static_cast<unsigned long long>((unsigned __int128)a * b >> 64); }
inline int __mul24(int a, int b) { return a * b; }
inline unsigned __umul24(unsigned a, unsigned b) { return a * b; }
inline unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned s) { return static_cast<unsigned>(((static_cast<uint64_t>(hi) << 32 | lo) << (s & 31)) >> 32); }
inline unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned s) { return static_cast<unsigned>((static_cast<uint64_t>(hi) << 32 | lo) >> (s & 31)); }
// nvcc clears bit 3 of each selector.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned s) {
  const uint64_t v = static_cast<uint64_t>(y) << 32 | x;
  unsigned r = 0;
  for (int i = 0; i < 4; ++i) r |= static_cast<unsigned>(v >> (s >> 4 * i & 7) * 8 & 255) << 8 * i;
  return r;
}
inline unsigned __vmaxu2(unsigned a, unsigned b) { return max(a & 0xFFFF, b & 0xFFFF) | max(a >> 16, b >> 16) << 16; }
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int i = 0; i < 4; ++i) c += (a >> 8 * i & 255) * (b >> 8 * i & 255);
  return c;
}
inline int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; ++i) c += static_cast<int8_t>(a >> 8 * i) * static_cast<int8_t>(b >> 8 * i);
  return c;
}

// ---------------------------------------------------------------------------------- memory
inline size_t __cvta_generic_to_shared(const void* p) { return emu::shared_offset(p); }
inline void* __cvta_shared_to_generic(size_t p) { return emu::shared_pointer(static_cast<uint32_t>(p)); }
inline size_t __cvta_generic_to_global(const void* p) { return reinterpret_cast<size_t>(p); }
template <class T> inline T __ldg(const T* p) { return *p; }
template <class T> inline T __ldca(const T* p) { return *p; }
template <class T> inline T __ldcs(const T* p) { return *p; }
template <class T> inline T __ldlu(const T* p) { return *p; }
template <class T> inline T __ldcg(const T* p) { emu::maybe_poll(); return *p; }
template <class T> inline T __ldcv(const T* p) { emu::poll(); return *p; }
template <class T> inline void __stcg(T* p, T v) { *p = v; emu::touch(); }
template <class T> inline void __stcs(T* p, T v) { *p = v; emu::touch(); }
template <class T> inline void __stwb(T* p, T v) { *p = v; emu::touch(); }
template <class T> inline void __stwt(T* p, T v) { *p = v; emu::touch(); }
inline void __threadfence() { emu::poll(); }
inline void __threadfence_block() {}
inline void __threadfence_system() { emu::poll(); }
inline void __nanosleep(unsigned) { emu::poll(); }
inline long long clock64() { return static_cast<long long>(emu::ticks()) * emu::options.clock; }
inline void __trap() { emu::fatal("__trap()"); }
inline void __prof_trigger(int) {}
inline void __assume(bool) {}

namespace emu {
template <class T, class F>
inline T atomic(T* p, F f) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) error("an atomic on a misaligned address");
  const T old = *p;
  const T next = f(old);
  *p = next;
  if (memcmp(&next, &old, sizeof old)) touch(), maybe_poll();
  else poll();  // changes nothing: perhaps a loop that waits
  return old;
}
}  // namespace emu
#define EMU_ATOMIC(name, expression)                                                                   \
  template <class T> inline T name(T* p, std::type_identity_t<T> v) {                                  \
    return emu::atomic(p, [&](T old) -> T { return static_cast<T>(expression); });                     \
  }                                                                                                    \
  template <class T> inline T name##_block(T* p, std::type_identity_t<T> v) { return name(p, v); }     \
  template <class T> inline T name##_system(T* p, std::type_identity_t<T> v) { return name(p, v); }
EMU_ATOMIC(atomicAdd, old + v)
EMU_ATOMIC(atomicSub, old - v)
EMU_ATOMIC(atomicMax, old > v ? old : v)
EMU_ATOMIC(atomicMin, old < v ? old : v)
EMU_ATOMIC(atomicExch, v)
EMU_ATOMIC(atomicAnd, old & v)
EMU_ATOMIC(atomicOr, old | v)
EMU_ATOMIC(atomicXor, old ^ v)
EMU_ATOMIC(atomicInc, old >= v ? 0 : old + 1)
EMU_ATOMIC(atomicDec, old == 0 || old > v ? v : old - 1)
template <class T> inline T atomicCAS(T* p, std::type_identity_t<T> compare, std::type_identity_t<T> v) {
  return emu::atomic(p, [&](T old) { return old == compare ? v : old; });
}

// ---------------------------------------------------------------------------------- warps, blocks
inline __attribute__((always_inline)) void __syncthreads() { emu::block_barrier(0, 0, "__syncthreads"); }
inline __attribute__((always_inline)) int __syncthreads_count(int p) { return emu::block_vote(p, 0); }
inline __attribute__((always_inline)) int __syncthreads_and(int p) { return emu::block_vote(p, 1); }
inline __attribute__((always_inline)) int __syncthreads_or(int p) { return emu::block_vote(p, 2); }
inline unsigned __activemask() { return emu::active_lanes(); }

namespace emu {
inline void finish_nothing(Meeting&) {}

template <class T> struct ShuffleArg { T value; int from; T result; };
template <class T, int kind>  // kind: a meeting for each sort of shuffle
void finish_shuffle(Meeting& m) {
  for (int l = 0; l < 32; ++l) {
    if (!(m.arrived >> l & 1)) continue;
    auto& a = *static_cast<ShuffleArg<T>*>(m.arg[l]);
    if (m.arrived >> a.from & 1) {
      a.result = static_cast<ShuffleArg<T>*>(m.arg[a.from])->value;
    } else {  // undefined
      memset(static_cast<void*>(&a.result), 0xFF, sizeof(T));
    }
  }
}
template <class T, int kind>
inline __attribute__((always_inline)) T shuffle(uint32_t mask, T v, int from, const char* what) {
  ShuffleArg<T> a{v, from & 31, v};
  meet(mask, finish_shuffle<T, kind>, &a, what);
  return a.result;
}
struct VoteArg { unsigned value, result; };
inline void finish_ballot(Meeting& m) {
  unsigned r = 0;
  for (int l = 0; l < 32; ++l)
    if (m.arrived >> l & 1 && static_cast<VoteArg*>(m.arg[l])->value) r |= 1u << l;
  for (int l = 0; l < 32; ++l)
    if (m.arrived >> l & 1) static_cast<VoteArg*>(m.arg[l])->result = r;
}
inline void finish_vote(Meeting& m) { finish_ballot(m); }
template <class T> struct ReduceArg { T value; };
template <class T, class F>
void finish_reduce(Meeting& m) {
  bool first = true;
  T r{};
  for (int l = 0; l < 32; ++l)
    if (m.arrived >> l & 1) {
      const T v = static_cast<ReduceArg<T>*>(m.arg[l])->value;
      r = first ? v : F::apply(r, v);
      first = false;
    }
  for (int l = 0; l < 32; ++l)
    if (m.arrived >> l & 1) static_cast<ReduceArg<T>*>(m.arg[l])->value = r;
}
struct RMax { template <class T> static T apply(T a, T b) { return a > b ? a : b; } };
struct RMin { template <class T> static T apply(T a, T b) { return a < b ? a : b; } };
struct RAdd { template <class T> static T apply(T a, T b) { return a + b; } };
struct RAnd { template <class T> static T apply(T a, T b) { return a & b; } };
struct ROr { template <class T> static T apply(T a, T b) { return a | b; } };
struct RXor { template <class T> static T apply(T a, T b) { return a ^ b; } };
template <class T, class F>
inline T reduce(uint32_t mask, T v, const char* what) {
  ReduceArg<T> a{v};
  meet(mask, finish_reduce<T, F>, &a, what);
  return a.value;
}
template <class T> void finish_match(Meeting& m) {
  struct A { T value; unsigned result; };
  for (int l = 0; l < 32; ++l)
    if (m.arrived >> l & 1) {
      auto& a = *static_cast<A*>(m.arg[l]);
      a.result = 0;
      for (int k = 0; k < 32; ++k)
        if (m.arrived >> k & 1 && static_cast<A*>(m.arg[k])->value == a.value) a.result |= 1u << k;
    }
}
}  // namespace emu

inline void __syncwarp(unsigned mask = ~0u) { emu::meet(mask, emu::finish_nothing, nullptr, "__syncwarp"); }
template <class T> inline T __shfl_sync(unsigned mask, T v, int source, int width = 32) {
  const int l = emu::lane();
  return emu::shuffle<T, 0>(mask, v, (l & ~(width - 1)) | (source & (width - 1)), "__shfl_sync");
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T v, int x, int width = 32) {
  const int l = emu::lane(), s = l ^ x;
  return emu::shuffle<T, 1>(mask, v, s >= (l & ~(width - 1)) + width ? l : s, "__shfl_xor_sync");
}
template <class T> inline T __shfl_up_sync(unsigned mask, T v, unsigned d, int width = 32) {
  const int l = emu::lane(), s = l - static_cast<int>(d);
  return emu::shuffle<T, 2>(mask, v, s < (l & ~(width - 1)) ? l : s, "__shfl_up_sync");
}
template <class T> inline T __shfl_down_sync(unsigned mask, T v, unsigned d, int width = 32) {
  const int l = emu::lane(), s = l + static_cast<int>(d);
  return emu::shuffle<T, 3>(mask, v, s >= (l & ~(width - 1)) + width ? l : s, "__shfl_down_sync");
}
inline unsigned __ballot_sync(unsigned mask, int p) {
  emu::VoteArg a{p != 0, 0};
  emu::meet(mask, emu::finish_ballot, &a, "__ballot_sync");
  return a.result;
}
inline int __any_sync(unsigned mask, int p) {
  emu::VoteArg a{p != 0, 0};
  emu::meet(mask, emu::finish_vote, &a, "__any_sync");
  return a.result != 0;
}
inline int __all_sync(unsigned mask, int p) {
  emu::VoteArg a{p == 0, 0};
  emu::meet(mask, emu::finish_vote, &a, "__all_sync");
  return a.result == 0;
}
template <class T> inline unsigned __match_any_sync(unsigned mask, T v) {
  struct { T value; unsigned result; } a{v, 0};
  emu::meet(mask, emu::finish_match<T>, &a, "__match_any_sync");
  return a.result;
}
#define EMU_REDUCE(name, op)                                                                                    \
  inline unsigned name(unsigned mask, unsigned v) { return emu::reduce<unsigned, emu::op>(mask, v, #name); }    \
  inline int name(unsigned mask, int v) { return emu::reduce<int, emu::op>(mask, v, #name); }
EMU_REDUCE(__reduce_max_sync, RMax)
EMU_REDUCE(__reduce_min_sync, RMin)
EMU_REDUCE(__reduce_add_sync, RAdd)
#undef EMU_REDUCE
inline unsigned __reduce_and_sync(unsigned mask, unsigned v) { return emu::reduce<unsigned, emu::RAnd>(mask, v, "__reduce_and_sync"); }
inline unsigned __reduce_or_sync(unsigned mask, unsigned v) { return emu::reduce<unsigned, emu::ROr>(mask, v, "__reduce_or_sync"); }
inline unsigned __reduce_xor_sync(unsigned mask, unsigned v) { return emu::reduce<unsigned, emu::RXor>(mask, v, "__reduce_xor_sync"); }

template <class T> cudaError_t cudaMemcpyToSymbolAsync(T& to, const void* from, size_t n, size_t offset = 0, cudaMemcpyKind = cudaMemcpyDefault, cudaStream_t = nullptr) {
  memcpy(reinterpret_cast<char*>(&to) + offset, from, n);
  return cudaSuccess;
}
