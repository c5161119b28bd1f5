// What the kernels of general attention share: how a problem is cut, and sums in two floats.
#pragma once

#include <algorithm>

#include "../softmax.h"
#include "device/element.cuh"
#include "kernels.h"

namespace tq::cuda {

constexpr int kKeys = 64;        // at a time
constexpr int kWord = 8;         // coordinates in four bytes
constexpr int kBlocksPerSm = 4;  // few tiles are split into about so many blocks, all resident
constexpr int kMaxSplits = 256;  // bounds the time of a merge
constexpr int kTilesPerSm = 8;   // in a round

// How the problem is cut, by the sizes of the query alone; and the workspace of a round, which does
// the tiles [first, first + count): row r of the t-th has slot t·R + r.
struct Plan {
  int rows;    // of a tile: R
  int width;   // D rounded up to whole words
  int span;    // threads that fetch one key: a power of two
  int splits;  // of a tile, at most
  int64_t group, rows_per_head, tiles_per_head, tiles, tiles_per_round;
  int64_t first = 0, count = 0;
  bool k_words = false, v_words = false;  // whether packed vectors can be read in words
  float* q = nullptr;                     // [slots][width]: rotated query, 0 beyond D; then output
  float* output = nullptr;                // [tiles][splits][rows][width], not divided by the sum
  SoftmaxState* state = nullptr;          // [tiles][splits][rows]

  Plan(const AttentionProblem& p, int multiprocessors) {
    group = p.Hq / p.Hkv;
    rows_per_head = group * p.Lq;
    rows = rows_per_head <= 1 ? 1 : rows_per_head <= 4 ? 4 : rows_per_head <= 8 ? 8 : 16;
    width = static_cast<int>((p.D + kWord - 1) / kWord * kWord);
    for (span = 1; span < std::min(32, width / kWord);) span *= 2;
    tiles_per_head = (rows_per_head + rows - 1) / rows;
    tiles = p.B * p.Hkv * tiles_per_head;
    splits = static_cast<int>(std::clamp<int64_t>(
        kBlocksPerSm * multiprocessors / std::max<int64_t>(1, tiles), 1, kMaxSplits));
    tiles_per_round = std::min<int64_t>(tiles, kTilesPerSm * multiprocessors);
  }
  int64_t round_slots() const { return tiles_per_round * rows; }
  int64_t round_floats() const { return round_slots() * (width + splits * (width + 2)); }

  __device__ int64_t part(int64_t tile, int split, int row) const {
    return (tile * splits + split) * rows + row;
  }
};

// A tile of the round.
struct Tile {
  int64_t b, h, first;  // batch row, KV head, first row of the head
  int rows;             // that exist

  __device__ Tile(const AttentionProblem& p, const Plan& plan, int64_t index) {
    const int64_t head = (plan.first + index) / plan.tiles_per_head;
    b = head / p.Hkv;
    h = head % p.Hkv;
    first = (plan.first + index) % plan.tiles_per_head * plan.rows;
    rows = static_cast<int>(min(int64_t{plan.rows}, plan.rows_per_head - first));
  }
  __device__ int64_t token(const Plan& plan, int row) const { return (first + row) / plan.group; }
  __device__ int64_t query_head(const Plan& plan, int row) const {
    return h * plan.group + (first + row) % plan.group;
  }
};

// A token of batch row b sees keys below this.
__device__ inline int64_t key_limit(const AttentionProblem& p, int64_t b, int64_t token) {
  const int64_t length = p.length(b);
  return p.causal ? max(int64_t{0}, length - p.Lq + token + 1) : length;
}

// What a tile sees, cut into splits of a multiple of kKeys.
struct Keys {
  int64_t begin, end, per_split;
  int splits;

  __device__ Keys(const AttentionProblem& p, const Plan& plan, const Tile& tile) {
    end = key_limit(p, tile.b, tile.token(plan, tile.rows - 1));  // the last row sees the most
    begin = min(p.start(tile.b), end);
    const int64_t pieces = (end - begin + kKeys - 1) / kKeys;
    const int64_t per = max(int64_t{1}, (pieces + plan.splits - 1) / plan.splits);
    per_split = per * kKeys;
    splits = static_cast<int>((pieces + per - 1) / per);
  }
};

// q^ = scale · rotation · query, or back: out = rotationᵀ · what merge left. For the plan's round.
void launch_rotate_to(const AttentionProblem&, const Plan&, cudaStream_t);
void launch_rotate_back(const AttentionProblem&, const Plan&, cudaStream_t);

// a + b, rounded; and to `lost`, without an error, what the rounding lost of it (Knuth).
__device__ inline float add(float a, float b, float* lost) {
  const float sum = a + b, second = sum - a;
  *lost = (a - (sum - second)) + (b - second);
  return sum;
}

}  // namespace tq::cuda
