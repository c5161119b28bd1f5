// The byte format of a compressed vector: its one home in C++, for host and device alike.
//
// A vector of D coordinates is D/2 bytes and one norm. Byte j holds the codebook indices of
// coordinates 2j (high nibble) and 2j + 1 (low nibble) of the rotated, normalised vector. The norm
// is stored as bfloat16 (float32 is accepted when reading).
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TQ_HOST_DEVICE __host__ __device__
#else
#define TQ_HOST_DEVICE
#endif

namespace tq {

inline constexpr int kLevels = 16;
inline constexpr int kBoundaries = kLevels - 1;
inline constexpr int kMinDim = 16;
inline constexpr int kMaxDim = 512;

// What the stored norm of a vector x means, with y = rotation · x / |x| and ŷ its rounding to the
// codebook. Decoding is the same for all: x̂ = norm · rotationᵀ · ŷ.
enum class NormPolicy : int {
  l2,        // |x|
  preserve,  // |x| / |ŷ|: x̂ has the length of x
  unbiased,  // |x| / ⟨y, ŷ⟩: ⟨x, x̂⟩ = |x|²
};

TQ_HOST_DEVICE constexpr bool valid_dim(int64_t dim) {
  return dim % 2 == 0 && dim >= kMinDim && dim <= kMaxDim;
}
TQ_HOST_DEVICE constexpr uint8_t pack(int even, int odd) {
  return static_cast<uint8_t>(even << 4 | odd);
}
TQ_HOST_DEVICE constexpr int even_index(uint8_t byte) { return byte >> 4; }
TQ_HOST_DEVICE constexpr int odd_index(uint8_t byte) { return byte & 15; }

}  // namespace tq
