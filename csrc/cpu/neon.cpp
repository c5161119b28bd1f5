// 64-bit Arm: 4 floats; every such processor has it.
#include "kernels.h"

#ifdef __aarch64__
#include <arm_neon.h>

namespace tq::cpu {
namespace {

struct Vec {
  static constexpr int width = 4;
  static constexpr int few_rows = 4;
  float32x4_t v;

  static Vec load(const float* p) { return {vld1q_f32(p)}; }
  static Vec load_bf16(const uint16_t* p) {
    return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16))};
  }
  static Vec load_f16(const uint16_t* p) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)))};
  }
  static Vec set1(float x) { return {vdupq_n_f32(x)}; }
  static Vec add(Vec a, Vec b) { return {vaddq_f32(a.v, b.v)}; }
  static Vec sub(Vec a, Vec b) { return {vsubq_f32(a.v, b.v)}; }
  static Vec mul(Vec a, Vec b) { return {vmulq_f32(a.v, b.v)}; }
  static Vec div(Vec a, Vec b) { return {vdivq_f32(a.v, b.v)}; }
  static Vec fma(Vec a, Vec b, Vec c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
  static Vec max(Vec a, Vec b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
  static Vec where_zero(Vec c, Vec a, Vec b) { return {vbslq_f32(vceqzq_f32(c.v), a.v, b.v)}; }
  static Vec where_less(Vec a, Vec b, Vec x, Vec y) {
    return {vbslq_f32(vcltq_f32(a.v, b.v), x.v, y.v)};
  }
  static Vec power_of_two(Vec p, Vec t) {
    const int32x4_t n = vshlq_n_s32(vreinterpretq_s32_f32(t.v), 23);
    return {vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(p.v), n))};
  }
  static float reduce_max(Vec a) { return vmaxvq_f32(a.v); }
  static float reduce_add(Vec a) { return vaddvq_f32(a.v); }
  static void reduce_add4(Vec a, Vec b, Vec c, Vec d, float* sums) {
    vst1q_f32(sums, vpaddq_f32(vpaddq_f32(a.v, b.v), vpaddq_f32(c.v, d.v)));
  }
  void store(float* p) const { vst1q_f32(p, v); }
  void store_bf16(uint16_t* p) const {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    vst1_u16(p, vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16));
  }
  void store_f16(uint16_t* p) const { vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
};

struct Boundaries {
  const float* boundary;

  explicit Boundaries(const float* boundaries) : boundary(boundaries) {}
  void below(Vec x, int32_t* index) const {
    int32x4_t n = vdupq_n_s32(0);
    for (int b = 0; b < kBoundaries; ++b)  // true is -1
      n = vsubq_s32(n, vreinterpretq_s32_u32(vcgtq_f32(x.v, vdupq_n_f32(boundary[b]))));
    vst1q_s32(index, n);
  }
};

struct Bytes {
  static constexpr int width = 16;
  uint8x16_t v;

  static Bytes load(const uint8_t* p) { return {vld1q_u8(p)}; }
  static Bytes interleave_low(Bytes a, Bytes b) { return {vzip1q_u8(a.v, b.v)}; }
  static Bytes interleave_high(Bytes a, Bytes b) { return {vzip2q_u8(a.v, b.v)}; }
  void store(uint8_t* p) const { vst1q_u8(p, v); }
};

// A table lookup gives one byte of each of 16 floats; from four tables, interleaved by the store,
// come the floats.
struct Table {
  uint8x16x4_t plane;

  explicit Table(const float* centroids)
      : plane(vld4q_u8(reinterpret_cast<const uint8_t*>(centroids))) {}
  void look_up(uint8x16_t index, float* out) const {
    uint8x16x4_t value;
    for (int i = 0; i < 4; ++i) value.val[i] = vqtbl1q_u8(plane.val[i], index);
    vst4q_u8(reinterpret_cast<uint8_t*>(out), value);
  }
};

inline void expand16(const uint8_t* bytes, const Table& table, float* hi, float* lo) {
  const uint8x16_t byte = vld1q_u8(bytes);
  table.look_up(vshrq_n_u8(byte, 4), hi);
  table.look_up(vandq_u8(byte, vdupq_n_u8(15)), lo);
}

// Of 4 bytes: byte i of the lookup's index vector is the nibble of float i / 4, so that one lookup
// per byte of a float, merged under a mask, gives 4 floats.
struct Pair {
  Vec hi, lo;
};
inline Pair expand(const uint8_t* bytes, const Table& table) {
  uint32_t word;
  __builtin_memcpy(&word, bytes, 4);
  static constexpr uint8_t kSpread[16] = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  const uint8x16_t byte = vqtbl1q_u8(vreinterpretq_u8_u32(vdupq_n_u32(word)), vld1q_u8(kSpread));
  const auto look_up = [&](uint8x16_t index) -> Vec {
    uint32x4_t sum = vdupq_n_u32(0);
    for (int i = 0; i < 4; ++i) {
      const uint32x4_t mask = vdupq_n_u32(0xffu << 8 * i);
      const uint32x4_t part = vreinterpretq_u32_u8(vqtbl1q_u8(table.plane.val[i], index));
      sum = vorrq_u32(sum, vandq_u32(part, mask));
    }
    return {vreinterpretq_f32_u32(sum)};
  };
  return {look_up(vshrq_n_u8(byte, 4)), look_up(vandq_u8(byte, vdupq_n_u8(15)))};
}

}  // namespace
}  // namespace tq::cpu

#include "kernels.inl"

namespace tq::cpu {
const Kernels* neon_kernels() {
  static constexpr Kernels kernels = table("neon");
  return &kernels;
}
}  // namespace tq::cpu

#else
const tq::cpu::Kernels* tq::cpu::neon_kernels() { return nullptr; }
#endif
