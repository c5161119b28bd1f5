// The codebook in shared memory: byte -> the fp16 levels of its two nibbles, the high one first.
//
// 256 words, each repeated for the 32 lanes of a warp, so that every lane reads its own bank
// whatever the bytes are. A word's row is 256 bytes apart from the next: then one byte permutation
// makes the address (the byte becomes bits 8 to 15, the lane bits 2 to 6). The unused half of each
// row, a "hole" of 128 bytes, holds other things.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "ptx.cuh"

namespace tq::cuda {

struct Table {
  static constexpr int kStride = 256;
  static constexpr int kBytes = 256 * kStride;

  // All threads of the block. `centroid`: number threadIdx.x % 16; levels are centroids · scale.
  template <int kWarps>
  static __device__ void fill(char* table, float centroid, float scale) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const uint32_t level = __half_as_ushort(__float2half(centroid * scale));
    // Four words at a time: eight lanes write the 32 repetitions of one.
#pragma unroll
    for (int i = 0; i < (64 + kWarps - 1) / kWarps; ++i) {
      const int byte = (i * kWarps + warp) * 4 + lane / 8;
      if (64 % kWarps != 0 && byte >= 256) break;
      const uint32_t high = __shfl_sync(~0u, level, byte >> 4);
      const uint32_t word = high | __shfl_sync(~0u, level, byte & 15) << 16;
      *reinterpret_cast<uint4*>(table + byte * kStride + lane % 8 * 16) = {word, word, word, word};
    }
  }

  // The levels of byte `which` of a word. `table`: its shared address; `lane4`: 4 · lane.
  static __device__ uint32_t levels(uint32_t table, uint32_t word, int which, uint32_t lane4) {
    const uint32_t at = __byte_perm(word, lane4, 0x7604 | which << 4);  // lane4, the byte, 0, 0
    return load_shared(table + at);
  }
};

}  // namespace tq::cuda
