// Plain C++, for processors without a vector set below: four floats that the compiler may or may
// not put into one register.
#include "kernels.h"

namespace tq::cpu {
namespace {

inline float half_to_float(uint16_t x);
inline uint16_t float_to_half(float x);
inline float bf16_to_float(uint16_t x);
inline uint16_t float_to_bf16(float x);
inline uint32_t to_bits(float value);
inline float from_bits(uint32_t bits);

struct Vec {
  static constexpr int width = 4;
  static constexpr int few_rows = 4;
  float lane[width];

  template <class F>
  static Vec make(F f) {
    Vec v;
    for (int i = 0; i < width; ++i) v.lane[i] = f(i);
    return v;
  }
  static Vec load(const float* p) {
    return make([=](int i) { return p[i]; });
  }
  static Vec load_bf16(const uint16_t* p) {
    return make([=](int i) { return bf16_to_float(p[i]); });
  }
  static Vec load_f16(const uint16_t* p) {
    return make([=](int i) { return half_to_float(p[i]); });
  }
  static Vec set1(float x) {
    return make([=](int) { return x; });
  }
  static Vec add(Vec a, Vec b) {
    return make([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Vec sub(Vec a, Vec b) {
    return make([&](int i) { return a.lane[i] - b.lane[i]; });
  }
  static Vec mul(Vec a, Vec b) {
    return make([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Vec div(Vec a, Vec b) {
    return make([&](int i) { return a.lane[i] / b.lane[i]; });
  }
  static Vec fma(Vec a, Vec b, Vec c) {
    return make([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static Vec max(Vec a, Vec b) {
    return make([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static Vec where_zero(Vec c, Vec a, Vec b) {
    return make([&](int i) { return c.lane[i] == 0 ? a.lane[i] : b.lane[i]; });
  }
  static Vec where_less(Vec a, Vec b, Vec x, Vec y) {
    return make([&](int i) { return a.lane[i] < b.lane[i] ? x.lane[i] : y.lane[i]; });
  }
  static Vec power_of_two(Vec p, Vec t) {
    return make([&](int i) { return from_bits(to_bits(p.lane[i]) + (to_bits(t.lane[i]) << 23)); });
  }
  static float reduce_max(Vec v) {
    float m = v.lane[0];
    for (int i = 1; i < width; ++i) m = v.lane[i] > m ? v.lane[i] : m;
    return m;
  }
  static float reduce_add(Vec v) { return (v.lane[0] + v.lane[1]) + (v.lane[2] + v.lane[3]); }
  static void reduce_add4(Vec a, Vec b, Vec c, Vec d, float* sums) {
    sums[0] = reduce_add(a), sums[1] = reduce_add(b);
    sums[2] = reduce_add(c), sums[3] = reduce_add(d);
  }
  void store(float* p) const {
    for (int i = 0; i < width; ++i) p[i] = lane[i];
  }
  void store_bf16(uint16_t* p) const {
    for (int i = 0; i < width; ++i) p[i] = float_to_bf16(lane[i]);
  }
  void store_f16(uint16_t* p) const {
    for (int i = 0; i < width; ++i) p[i] = float_to_half(lane[i]);
  }
};

struct Boundaries {
  const float* boundary;

  explicit Boundaries(const float* boundaries) : boundary(boundaries) {}
  void below(Vec x, int32_t* index) const {
    for (int i = 0; i < Vec::width; ++i) {
      index[i] = 0;
      for (int b = 0; b < kBoundaries; ++b) index[i] += x.lane[i] > boundary[b];
    }
  }
};

struct Bytes {
  static constexpr int width = 16;
  uint8_t byte[width];

  static Bytes load(const uint8_t* p) {
    Bytes v;
    for (int i = 0; i < width; ++i) v.byte[i] = p[i];
    return v;
  }
  static Bytes interleave_low(const Bytes& a, const Bytes& b) { return interleave(a, b, 0); }
  static Bytes interleave_high(const Bytes& a, const Bytes& b) { return interleave(a, b, 8); }
  void store(uint8_t* p) const {
    for (int i = 0; i < width; ++i) p[i] = byte[i];
  }

 private:
  static Bytes interleave(const Bytes& a, const Bytes& b, int from) {
    Bytes v;
    for (int i = 0; i < 8; ++i) {
      v.byte[2 * i] = a.byte[from + i];
      v.byte[2 * i + 1] = b.byte[from + i];
    }
    return v;
  }
};

struct Table {
  const float* centroids;

  explicit Table(const float* from) : centroids(from) {}
};

struct Pair {
  Vec hi, lo;
};
inline Pair expand(const uint8_t* bytes, const Table& table) {
  return {Vec::make([&](int i) { return table.centroids[even_index(bytes[i])]; }),
          Vec::make([&](int i) { return table.centroids[odd_index(bytes[i])]; })};
}
inline void expand16(const uint8_t* bytes, const Table& table, float* hi, float* lo) {
  for (int i = 0; i < 16; ++i) {
    hi[i] = table.centroids[even_index(bytes[i])];
    lo[i] = table.centroids[odd_index(bytes[i])];
  }
}

}  // namespace
}  // namespace tq::cpu

#include "kernels.inl"

namespace tq::cpu {
const Kernels* scalar_kernels() {
  static constexpr Kernels kernels = table("scalar");
  return &kernels;
}
}  // namespace tq::cpu
