// Fake: __half with round to nearest even.
#pragma once
#include <immintrin.h>

#include "cuda_runtime.h"

struct __half_raw { unsigned short x; };
struct __half {
  unsigned short bits;
  __half() = default;
  __half(__half_raw r) : bits(r.x) {}
  __half(float x) : bits(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT)) {}
  __half(double x) : __half(static_cast<float>(x)) {}
  __half(int x) : __half(static_cast<float>(x)) {}
  __half(unsigned x) : __half(static_cast<float>(x)) {}
  __half(long x) : __half(static_cast<float>(x)) {}
  __half(unsigned long x) : __half(static_cast<float>(x)) {}
  operator float() const { return _cvtsh_ss(bits); }
  operator __half_raw() const { return {bits}; }
};
using half = __half;
struct alignas(4) __half2 {
  __half x, y;
  __half2() = default;
  __half2(__half a, __half b) : x(a), y(b) {}
};
using half2 = __half2;
static_assert(sizeof(__half) == 2 && sizeof(__half2) == 4 && std::is_trivially_copyable_v<__half2>);

inline float __half2float(__half h) { return _cvtsh_ss(h.bits); }
inline __half __float2half(float x) { return __half(x); }
inline __half __float2half_rn(float x) { return __half(x); }
inline __half __float2half_rz(float x) { return __half_raw{static_cast<unsigned short>(_cvtss_sh(x, _MM_FROUND_TO_ZERO))}; }
inline __half __double2half(double x) { return __half(static_cast<float>(x)); }
inline __half __int2half_rn(int x) { return __half(static_cast<float>(x)); }
inline __half __ushort_as_half(unsigned short x) { return __half_raw{x}; }
inline __half __short_as_half(short x) { return __half_raw{static_cast<unsigned short>(x)}; }
inline unsigned short __half_as_ushort(__half h) { return h.bits; }
inline short __half_as_short(__half h) { return static_cast<short>(h.bits); }
inline __half2 __floats2half2_rn(float a, float b) { return {__half(a), __half(b)}; }
inline __half2 __float22half2_rn(float2 v) { return {__half(v.x), __half(v.y)}; }
inline __half2 __float2half2_rn(float a) { return {__half(a), __half(a)}; }
inline float2 __half22float2(__half2 h) { return {__half2float(h.x), __half2float(h.y)}; }
inline float __low2float(__half2 h) { return __half2float(h.x); }
inline float __high2float(__half2 h) { return __half2float(h.y); }
inline __half __low2half(__half2 h) { return h.x; }
inline __half __high2half(__half2 h) { return h.y; }
inline __half2 __low2half2(__half2 h) { return {h.x, h.x}; }
inline __half2 __high2half2(__half2 h) { return {h.y, h.y}; }
inline __half2 __lows2half2(__half2 a, __half2 b) { return {a.x, b.x}; }
inline __half2 __highs2half2(__half2 a, __half2 b) { return {a.y, b.y}; }
inline __half2 __lowhigh2highlow(__half2 h) { return {h.y, h.x}; }
inline __half2 __half2half2(__half h) { return {h, h}; }
inline __half2 __halves2half2(__half a, __half b) { return {a, b}; }
inline __half2 make_half2(__half a, __half b) { return {a, b}; }
inline int __half2int_rn(__half h) { return __float2int_rn(h); }

inline bool __hisnan(__half h) { return (h.bits & 0x7FFF) > 0x7C00; }
inline int __hisinf(__half h) { return (h.bits & 0x7FFF) == 0x7C00 ? (h.bits >> 15 ? -1 : 1) : 0; }
inline __half __hneg(__half h) { return __half_raw{static_cast<unsigned short>(h.bits ^ 0x8000)}; }
inline __half __habs(__half h) { return __half_raw{static_cast<unsigned short>(h.bits & 0x7FFF)}; }
inline __half __hadd(__half a, __half b) { return __half(__half2float(a) + __half2float(b)); }
inline __half __hsub(__half a, __half b) { return __half(__half2float(a) - __half2float(b)); }
inline __half __hmul(__half a, __half b) { return __half(__half2float(a) * __half2float(b)); }
inline __half __hdiv(__half a, __half b) { return __half(__half2float(a) / __half2float(b)); }
inline __half __hfma(__half a, __half b, __half c) {
  return __half(static_cast<float>(static_cast<double>(__half2float(a)) * __half2float(b) + __half2float(c)));
}
inline __half __hmax(__half a, __half b) { return __hisnan(a) ? b : __hisnan(b) ? a : __half2float(a) > __half2float(b) ? a : b; }
inline __half __hmin(__half a, __half b) { return __hisnan(a) ? b : __hisnan(b) ? a : __half2float(a) < __half2float(b) ? a : b; }
inline bool __heq(__half a, __half b) { return __half2float(a) == __half2float(b); }
inline bool __hlt(__half a, __half b) { return __half2float(a) < __half2float(b); }
inline bool __hgt(__half a, __half b) { return __half2float(a) > __half2float(b); }
inline bool __hle(__half a, __half b) { return __half2float(a) <= __half2float(b); }
inline bool __hge(__half a, __half b) { return __half2float(a) >= __half2float(b); }
inline __half operator+(__half a, __half b) { return __hadd(a, b); }
inline __half operator-(__half a, __half b) { return __hsub(a, b); }
inline __half operator*(__half a, __half b) { return __hmul(a, b); }
inline __half operator/(__half a, __half b) { return __hdiv(a, b); }
inline __half operator-(__half a) { return __hneg(a); }
inline __half& operator+=(__half& a, __half b) { return a = a + b; }
inline __half& operator*=(__half& a, __half b) { return a = a * b; }
#define EMU_H2(name, scalar) \
  inline __half2 name(__half2 a, __half2 b) { return {scalar(a.x, b.x), scalar(a.y, b.y)}; }
EMU_H2(__hadd2, __hadd)
EMU_H2(__hsub2, __hsub)
EMU_H2(__hmul2, __hmul)
EMU_H2(__h2div, __hdiv)
EMU_H2(__hmax2, __hmax)
EMU_H2(__hmin2, __hmin)
EMU_H2(operator+, __hadd)
EMU_H2(operator-, __hsub)
EMU_H2(operator*, __hmul)
#undef EMU_H2
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
inline __half2 __hneg2(__half2 a) { return {__hneg(a.x), __hneg(a.y)}; }
inline __half2 __habs2(__half2 a) { return {__habs(a.x), __habs(a.y)}; }
inline __half2 h2exp2(__half2 a) { return {__half(exp2f(a.x)), __half(exp2f(a.y))}; }
inline __half hexp2(__half a) { return __half(exp2f(a)); }
