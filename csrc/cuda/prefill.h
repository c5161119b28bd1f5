// Attention of many query rows: what its kernels are told, and the memory they share.
//
// The tensor cores multiply tiles of fp16 keys and values, which lie in shared memory as "images"
// (device/wgmma.cuh, swizzled). prefill_images.cuh makes them of compressed ones. On Hopper
// prefill.cuh multiplies, or prefill_wide.cuh at D = 512; elsewhere, from sm_80 on,
// prefill_portable.cuh. Two ways:
//   fused     warps of the same block make the images: for few rows, each tile is used few times;
//             on Hopper, up to D = 256
//   expanded  a kernel before (prefill_expand.cu) writes the images of as many KV heads as fit
//             into the workspace, a round; how many that are is found on the device, from the
//             lengths there. Where not even one fits, its keys come in windows, a round each, and
//             the sums of a slice of its rows are carried from one to the next
// Where tiles of rows are too few for all multiprocessors, their keys are split: each block writes
// its sums, and when all have, each adds up those of some rows (prefill_rows.cuh, add_splits).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "codec.cuh"
#include "decode.h"
#include "kernels.h"
#include "plan.h"

namespace tq::cuda {

// A tile of rows: query rows of a KV head, by tokens, then by heads of its group.
TQ_HOST_DEVICE constexpr int prefill_rows(int D) { return D <= 256 ? 128 : 64; }
// A tile of keys, and their values.
TQ_HOST_DEVICE constexpr int prefill_keys(int D) { return D <= 128 ? 128 : 64; }
// The image of a tile: slabs of 64 coordinates, each [keys][128 bytes], pieces of 16 bytes
// interchanged.
TQ_HOST_DEVICE constexpr int slabs_of(int D) { return (D + 63) / 64; }
TQ_HOST_DEVICE constexpr int image_bytes_of(int D) { return slabs_of(D) * prefill_keys(D) * 128; }
// Norms of a tile that are not in its images (prefill_images.cuh): of the keys, four flags and a
// number each; then of the values, four flags and two numbers each.
TQ_HOST_DEVICE constexpr int key_norm_bytes_of(int D) { return 16 + 4 * prefill_keys(D); }
TQ_HOST_DEVICE constexpr int value_norm_bytes_of(int D) { return 16 + 8 * prefill_keys(D); }
TQ_HOST_DEVICE constexpr int norm_bytes_of(int D) {
  return key_norm_bytes_of(D) + value_norm_bytes_of(D);
}
// A tile in the workspace: the keys' image, the values', norms.
TQ_HOST_DEVICE constexpr int tile_bytes_of(int D) {
  return 2 * image_bytes_of(D) + norm_bytes_of(D);
}
// The rotation comes as images, too: its rows are keys for the query and values for the output.
TQ_HOST_DEVICE constexpr int rotation_images(int D) {
  return (D + prefill_keys(D) - 1) / prefill_keys(D);
}

// What a mask shows a tile of rows of a tile of keys.
enum Sight : uint8_t { kSome, kNone, kAll };

// There are two kinds of these kernels: Hopper's, and portable ones that do with the 99 KB of
// shared memory that each block may have elsewhere. Compiled for an architecture, one of them is
// empty.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
inline constexpr bool kHopperHere = true;
#else
inline constexpr bool kHopperHere = false;
#endif
// Blocks of the portable kernel that a multiprocessor runs at once: as many as registers allow.
TQ_HOST_DEVICE constexpr int portable_prefill_blocks(int D) { return D == 64 ? 2 : 1; }

struct PrefillTask {
  AttentionProblem problem;
  char* rotation;  // images
  char* tiles;     // of a round: [KV head][tile], `capacity` in all; or null: fused
  int keys, capacity;
  int windows;    // of a KV head's keys, at most
  int slice;      // tiles of rows whose sums can be carried
  float4* carry;  // [row tile of the slice][group]: sums as the threads hold them
  Sight* sights;  // [batch row of the mask][row tile][tile of `key_tiles`], or null: no mask
  int key_tiles;  // of the buffer
  int group;      // query heads to a KV head
  int row_tiles;  // of a KV head
  int splits;     // of a row tile's keys, at most
  int round;
  // [window][KV head][row tile][group]: splits that are done, and in the upper half the shares that
  // the last of them has to add up besides its own. Zero at first.
  unsigned long long* done;
  int64_t patience;  // clocks that a block waits for others
  // [KV head of the round][row tile][split][group]: sums as the threads hold them.
  float4* partials;
  PrefillKind kind;
  int blocks;  // that attend at once

  TQ_HOST_DEVICE int heads() const { return static_cast<int>(problem.B * problem.Hkv); }

  // What is attended to in this round.
  struct Round {
    int first, heads;         // KV heads: b · Hkv + h
    int row_tile, row_tiles;  // of each: from .. on, so many
    int window, tile, tiles;  // its number; tiles of keys from .. on, so many
    int splits;               // blocks that share a row tile
  };
  __device__ Round find_round() const {
    int64_t longest = 1;
    const bool ragged = problem.kv_len.data && problem.kv_len.stride[0] != 0;
    for (int b = 0; b < (ragged ? static_cast<int>(problem.B) : 1); ++b)
      longest = max(longest, problem.length(b));
    const int needed = static_cast<int>((longest + keys - 1) / keys);
    const int parts = needed <= unsplit_tiles(static_cast<int>(problem.D))
                          ? 1
                          : min(splits, (needed + kLeastSplit - 1) / kLeastSplit);
    if (needed > capacity) {
      const Part window = part_of(needed, capacity, round);
      const Part rows = part_of(row_tiles, slice, round / window.parts);
      const int head = round / window.parts / rows.parts;
      return {head,         head < heads(), rows.first,  rows.size,
              window.index, window.first,   window.size, parts};
    }
    int each = static_cast<int>(heads_of_round(heads(), capacity / needed));
    // Of split row tiles all parts run at once.
    if (parts > 1) each = min(each, blocks / (row_tiles * parts));
    const int first = static_cast<int>(min(int64_t{round} * each, int64_t{heads()}));
    return {first, min(each, heads() - first), 0, row_tiles, 0, 0, needed, parts};
  }
  // Where the images are made as they are needed.
  __device__ Round fused_round() const {
    return {0, heads(), 0, row_tiles, 0, 0, key_tiles, splits};
  }

 private:
  // The n-th of the parts, modulo their number, of `total` in parts of at most `most`.
  struct Part {
    int parts, index, first, size;
  };
  static __device__ Part part_of(int total, int most, int n) {
    const int parts = (total + most - 1) / most, each = (total + parts - 1) / parts;
    const int index = n % parts, first = min(index * each, total);
    return {parts, index, first, min(each, total - first)};
  }
};

// A group's sums: of 64 rows and at most 256 columns, and the states of two rows of a thread.
TQ_HOST_DEVICE constexpr int partial_words_of(int D) { return 128 * ((D < 256 ? D : 256) / 8 + 1); }

// Makes the rotation's images, and zeroes `done`.
cudaError_t launch_prepare_prefill(const PrefillTask&, cudaStream_t);
cudaError_t launch_expand(const PrefillTask&, cudaStream_t);
template <int D>
cudaError_t launch_prefill_dim(const PrefillTask&, cudaStream_t);
template <int D>
cudaError_t launch_portable_prefill(const PrefillTask&, cudaStream_t);

}  // namespace tq::cuda
