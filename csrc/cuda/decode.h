// What the decode kernels are asked to do, and how large their pieces are: plain integers, shared
// by the host, which plans, and the device.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "../problem.h"

namespace tq::cuda {

// The codebook as the kernels hold it: fp16(centroid · √D · kLevelScale). √D makes it the codebook
// of N(0, 1), and this factor is where its 16 levels happen to fall closest to fp16 numbers: RMS
// 0.004 % instead of 0.02 %.
inline constexpr float kLevelScale = 1.26017f;

// How the work is cut (device/schedule.cuh), as far as it does not depend on the lengths.
struct DecodePlan {
  int blocks;           // at most one per multiprocessor
  int tile_rows;        // query rows that a block takes at once: 8, 16 or 32
  int row_tiles;        // of a KV head's G · Lq query rows
  int items;            // B · Hkv · row_tiles
  int blocks_per_item;  // 0: the items lie on a line; else they are dealt out evenly,
  int items_per_block;  // where at least one of the two is 1
  int partial_slots;    // places for what a block publishes of an item that it shares
  uint32_t min_units;   // with fewer units a block is not worth its share of the exchange
  uint32_t min_span;    // an item's rotation is worth as many blocks as this many units
};

// Packed bytes or norms of all heads, with strides in 16 bytes.
struct Source {
  const char* data;
  uint32_t batch_row, head;
};

// A problem with its workspace. Layouts in [] are of the memory behind the pointer.
struct DecodeTask {
  AttentionProblem problem;
  DecodePlan plan;
  int64_t patience;  // clocks that a block waits for others
  Source k, v, k_norms, v_norms;
  int group;         // query heads per KV head; row r of a KV head is token r / group
  __half* q;         // [items][tile_rows][D], rotated, scaled by a power of two
  float* q_scale;    // [items][tile_rows], what makes a product of levels a score in log2 units
  float4* partials;  // [partial_slots][partial_words]
  float4* results;   // [blocks][D / 16 · tile_rows / 8][32], normalised, in fragment order
};

// float4 words of a partial: accumulators in fragment order, then {max, sum} of each row.
TQ_HOST_DEVICE constexpr int result_words(int dim, int tile_rows) { return dim * tile_rows / 4; }
TQ_HOST_DEVICE constexpr int partial_words(int dim, int tile_rows) {
  return result_words(dim, tile_rows) + tile_rows / 2;
}

// Words of the exchange hold this until they are written: a NaN that no arithmetic produces.
inline constexpr uint32_t kUnwritten = 0xFFFFFFFFu;

// Rotates the queries and sets the exchange to kUnwritten; then one kernel does the rest.
cudaError_t launch_rotate_query(const DecodeTask& task, cudaStream_t stream);

template <int D>
cudaError_t launch_decode(const DecodeTask& task, cudaStream_t stream);

}  // namespace tq::cuda
