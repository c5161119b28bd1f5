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

// Shared memory that a block of the portable kernels may use: what sm_86, sm_89 and sm_120 give it.
// So many warps' rings fit there.
inline constexpr int kPortableLimit = 99 * 1024;
TQ_HOST_DEVICE constexpr int portable_warps(int dim) { return dim <= 192 ? 4 : 512 / dim; }

inline constexpr float kLog2e = 1.4426950408889634f;

// How the work is cut (device/schedule.cuh), as far as it does not depend on the lengths.
struct DecodePlan {
  bool portable;        // which kind of kernels (decode_block.cuh)
  int blocks;           // at most as many as run at once
  int tile_rows;        // query rows that a block takes at once: 8, 16 or 32
  int row_pairs;        // of a tile: what is exchanged are words of two rows x two coordinates
  int row_tiles;        // of a KV head's G · Lq query rows
  int items;            // B · Hkv · row_tiles
  int blocks_per_item;  // 0: the items lie on a line; else they are dealt out evenly,
  int items_per_block;  // where at least one of the two is 1
  int partial_slots;    // places for a block's sums of an item that it shares
  int result_slots;     // places for such an item's result
  int min_units_log2;   // with fewer units a block is not worth its share of the exchange
  uint32_t min_span;    // an item's rotation is worth as many blocks as this many units

  // How many blocks so many units are worth.
  TQ_HOST_DEVICE uint32_t worth(uint32_t units) const {
    return ((units > min_span ? units : min_span) + (1u << min_units_log2) - 1) >> min_units_log2;
  }
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
  int group;  // query heads per KV head; row r of a KV head is token r / group
  // [items][tile_rows][query_stride]: D numbers, rotated and scaled by a power of two; behind them
  // four floats, the first of which makes a product with levels a score in log2 units.
  __half* q;
  float4* partials;  // [partial_slots · partial_words], see decode_block.cuh
  float4* results;   // [result_slots][result_words], normalised; directly behind the partials
};

TQ_HOST_DEVICE constexpr int query_stride(int dim) { return dim + 8; }

// A result's words: {row a, row b, row a, row b} of coordinates {d, d, d + 1, d + 1}.
TQ_HOST_DEVICE constexpr int result_words(int dim, int row_pairs) { return row_pairs * dim / 2; }

// Words of a block's sums: a result's, and the states of each pair of rows.
TQ_HOST_DEVICE constexpr int partial_words(int dim, int row_pairs) {
  return result_words(dim, row_pairs) + row_pairs;
}

TQ_HOST_DEVICE inline int exchange_words(const DecodeTask& task) {
  const DecodePlan& plan = task.plan;
  const int dim = static_cast<int>(task.problem.D);
  return plan.partial_slots * partial_words(dim, plan.row_pairs) +
         plan.result_slots * result_words(dim, plan.row_pairs);
}

// Words of the exchange hold this until they are written: a NaN that no arithmetic produces.
inline constexpr uint32_t kUnwritten = 0xFFFFFFFFu;

// Rotates the queries and sets the exchange to kUnwritten; then one kernel does the rest.
cudaError_t launch_rotate_query(const DecodeTask& task, cudaStream_t stream);

template <int D>
cudaError_t launch_decode(const DecodeTask& task, cudaStream_t stream);

}  // namespace tq::cuda
