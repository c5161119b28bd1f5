// Which kernel attends, and how its work is cut: pure functions of sizes, measured on an H200
// (benchmarks/results/h200.csv, "sweep").
#pragma once

#include <algorithm>
#include <cstdint>

#include "../problem.h"

namespace tq::cuda {

// The prefill kernels that there are on an architecture, by the one that was compiled for: 90 is
// compute capability 9.0.
enum class PrefillKind { none, portable, hopper };
constexpr PrefillKind prefill_kind(int architecture) {
  return architecture / 10 == 9 ? PrefillKind::hopper
         : architecture >= 80   ? PrefillKind::portable
                                : PrefillKind::none;
}

// Whether there is a kernel that makes images itself (prefill.h).
constexpr bool has_fused(PrefillKind kind, int64_t D) {
  return kind == PrefillKind::hopper && D <= 256;
}

// Query rows of a KV head from which on the prefill kernels are faster than the decode kernels, for
// so many keys in all KV heads together. Prefill is paid for once, in 10 to 40 µs, and for each
// tile of 64 or 128 rows; decode reads everything again for each 32 rows or fewer, but its reading
// is faster. At D = 256 one warpgroup makes all of the fused kernel's images, at D = 512 there is
// none. The portable kernels are slower at both.
constexpr int64_t least_prefill_rows(PrefillKind kind, int64_t D, int64_t keys) {
  const bool few = keys <= 65536;
  if (kind == PrefillKind::portable) return D == 512 ? 96 : D == 256 ? 192 : 128;
  if (D == 512) return few ? 96 : 192;
  if (D == 256) return keys < 16384 ? 257 : 192;
  return few && D <= 128 ? 17 : 64;
}

// Tiles of rows from which on images are expanded once for all of them, and not made anew by each.
constexpr int64_t least_expanded_tiles(PrefillKind kind, int64_t D) {
  return has_fused(kind, D) ? 6 : 1;
}

// So many KV heads at a time, if there is room for `room`: all rounds are about equal.
TQ_HOST_DEVICE constexpr int64_t heads_of_round(int64_t heads, int64_t room) {
  const int64_t rounds = (heads + room - 1) / room;
  return (heads + rounds - 1) / rounds;
}

// Tiles of keys that blocks have at least, where several share a tile of rows; and how many are not
// shared, for adding up takes as long as several tiles.
constexpr int kLeastSplit = 2;
TQ_HOST_DEVICE constexpr int unsplit_tiles(int D) { return D <= 128 ? 6 : 12; }

// Blocks that share the `tiles` of keys of a tile of rows, at most: where there are so many row
// tiles at a time, in all heads, they are the `blocks` that run at once.
constexpr int64_t prefill_splits(int64_t row_tiles, int64_t tiles, int64_t blocks) {
  constexpr int64_t kMost = 32;  // bits of a word (prefill_rows.cuh, claim_shares)
  const int64_t useful = (tiles + kLeastSplit - 1) / kLeastSplit;
  return std::clamp(std::min(blocks / row_tiles, useful), int64_t{1}, kMost);
}

}  // namespace tq::cuda
