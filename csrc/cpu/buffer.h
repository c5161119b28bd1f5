// Scratch memory and the two forms in which a rotation enters a product.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "kernels.h"

namespace tq::cpu {

// Work that is worth waking a thread for, in multiply-adds.
inline constexpr int64_t kGrain = 1 << 18;

// Uninitialised floats, aligned to a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t size) : memory_(std::malloc(size * sizeof(float) + kLine)) {
    if (!memory_) throw std::bad_alloc();
    const auto address = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = reinterpret_cast<float*>((address + kLine - 1) / kLine * kLine);
  }
  float* get() const { return data_; }
  float* operator+(int64_t offset) const { return data_ + offset; }

 private:
  static constexpr uintptr_t kLine = 64;
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  float* data_;
};

// x · rotationᵀ, for row vectors x: what compresses, and what rotates queries. Panels of
// rotationᵀ: D rows, D columns padded with zeros.
inline Buffer rotate_panels(const float* rotation, int64_t D) {
  const int64_t width = round_up(D, kPanel);
  Buffer panels(D * width);
  for (int64_t column = 0; column < width; ++column) {
    float* out = panels + column / kPanel * D * kPanel + column % kPanel;
    for (int64_t k = 0; k < D; ++k) out[k * kPanel] = column < D ? rotation[column * D + k] : 0;
  }
  return panels;
}

// y · rotation, for row vectors y in the order of expanded_position: what decompresses, and what
// rotates attention's output back. Rows that expansion pads are zero.
inline Buffer unrotate_panels(const float* rotation, int64_t D) {
  const int64_t rows = expanded_dim(D), width = round_up(D, kPanel);
  Buffer panels(rows * width);
  for (int64_t d = 0; d < rows; ++d) {  // rotated coordinate, past D: padding
    float* out = panels + expanded_position(d) * kPanel;
    for (int64_t column = 0; column < width; column += kPanel, out += rows * kPanel)
      for (int64_t j = 0; j < kPanel; ++j)
        out[j] = d < D && column + j < D ? rotation[d * D + column + j] : 0;
  }
  return panels;
}

// Vector i of [B, H, S] in memory.
inline void* row_pointer(const View& v, int64_t element_size, int64_t b, int64_t h, int64_t s) {
  return static_cast<char*>(v.data) +
         (b * v.stride[0] + h * v.stride[1] + s * v.stride[2]) * element_size;
}
inline int64_t size_of(Dtype dtype) { return dtype == Dtype::f32 ? 4 : 2; }
inline Strided row(const View& v, int64_t b, int64_t h, int64_t s) {
  return {row_pointer(v, size_of(v.dtype), b, h, s), v.dtype, v.stride[3]};
}
inline uint8_t* byte_row(const View& v, int64_t b, int64_t h, int64_t s) {
  return static_cast<uint8_t*>(row_pointer(v, 1, b, h, s));
}

}  // namespace tq::cpu
