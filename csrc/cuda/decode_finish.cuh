// The frame of the decode kernel: its sizes, where things lie in shared memory, and the way from a
// block's sums to the output.
//
// Blocks that share an item exchange through global memory in two steps:
//   1. each publishes its sums; a fragment of the accumulators (16 coordinates x 8 rows) is added
//      up over all blocks by one of them, normalised, and published again
//   2. each collects the whole result and rotates some tiles of 16 coordinates: out = Πᵀ · result
// so a block reads about as much as one block's sums and one result, however many blocks there are.
// No flags: a word is there when it is no longer kUnwritten. Normally all blocks run at once. Where
// other work holds multiprocessors they may not, so no block waits for longer than task.patience:
// then it does its whole item alone, and so whoever waits for it in turn.
//
// Code that runs once per item is kept short, in loops: at small contexts the time is instructions
// fetched for the first time (8 clocks each, measured), not data.
#pragma once

#include "decode.h"
#include "device/element.cuh"
#include "device/ptx.cuh"
#include "device/ring.cuh"
#include "device/schedule.cuh"
#include "device/table.cuh"
#include "device/tile.cuh"

namespace tq::cuda {

// What these kernels need: bulk copies, and 227 KB of shared memory. Elsewhere they are empty, and
// general.cu does their work.
#if !defined(__CUDA_ARCH__) || (__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
inline constexpr bool kDecodes = true;
#else
inline constexpr bool kDecodes = false;
#endif

// Softmax of one row in log2 units. `max` bounds log2 of (weight · norm of the value), so that what
// goes into the products is at most about 1 however large or small the norms are; the sum of
// weights is in float32 and needs no bound of its own.
struct State {
  float max, sum;
};

inline constexpr float kNothing = -1e30f;  // max before any key
// Before max is raised, weights times norms may grow to 256, and sums of weights to 2^90, which
// they do only where norms are tiny: log2 of a norm counts as no less than -80. (Were it less, a
// large norm after a tiny one could raise max by more than the exponents of float32 hold.)
inline constexpr uint32_t kOverHeadroom = 0x7FFF7FFF - 0x5C005C00;  // 0x5C00: 256 in fp16
inline constexpr float kLargestSum = 0x1p90f;
inline constexpr float kLeastNorm = -80.0f;
inline constexpr float kLog2e = 1.4426950408889634f;

// What the block needs to know of a query row.
struct RowInfo {
  const bool* mask;  // its row of the mask, or null
  int64_t out;       // where its output begins
  int lse;           // where its lse goes
  int end;           // it sees keys below this one
  float factor;      // of its result, at the end
  float sink;        // in log2 units
};

// Sizes. kNT: tiles of 8 query rows.
template <int D, int kNT>
struct DecodeShape {
  static constexpr int kRows = 8 * kNT;
  static constexpr int kTiles = D / 16;            // of 16 coordinates
  static constexpr int kFragments = kTiles * kNT;  // of the accumulators: 16 x 8 numbers, 4 a lane
  // Accumulators take D/4 · kNT registers a lane, and 65536 registers are 16 warps of 128.
  static constexpr int kWarps = kNT == 1 && D <= 128 ? 16 : 8;
  static constexpr int kThreads = 32 * kWarps;
  // Shared memory: the table, the rings, scratch of a fragment for each warp and query tile, and
  // small things. In the holes of the table: the result and the warps' sums.
  static_assert((D + 1 + kWarps) * kRows <= 256 * 32);
  static constexpr int kScratchBytes = kWarps * kNT * 512;
  static constexpr int kFixedBytes =
      Table::kBytes + kScratchBytes + kRows * static_cast<int>(sizeof(RowInfo));
  static constexpr int kLimit = 227 * 1024;
  static constexpr int kFit = (kLimit - kFixedBytes) / (kWarps * (Tile<D>::kBytes + 8));
  static constexpr int kSlots = kFit >= 8 ? 8 : kFit / 2 * 2;
  static_assert(kSlots >= 2);
  using Slots = Ring<D, kSlots>;
  static constexpr int kRing = Table::kBytes;
  static constexpr int kScratch = kRing + kWarps * Slots::kBytes;
  static constexpr int kRowInfo = kScratch + kScratchBytes;
  static constexpr int kBarriers = kRowInfo + kRows * sizeof(RowInfo);
  static constexpr int kBytes = kBarriers + kWarps * kSlots * 8;
  static_assert(kBytes <= kLimit);
  static_assert(kFragments * 512 <= Slots::kBytes);  // a warp's accumulators fit into its ring
};

template <int D, int kNT>
struct Finish {
  using S = DecodeShape<D, kNT>;
  using T = Tile<D>;

  static __device__ int lane() { return threadIdx.x % 32; }
  static __device__ int g() { return lane() / 4; }
  static __device__ int t() { return lane() % 4; }

  // ------------------------------------------------------------------------------ shared memory
  static __device__ char* shared() {
    extern __shared__ __align__(1024) char memory[];
    return memory;
  }
  // Float i of what lies in the table's holes, 32 to a hole.
  static __device__ float* in_holes(int i) {
    return reinterpret_cast<float*>(shared() + i / 32 * Table::kStride + 128) + i % 32;
  }
  // The item's result: coordinate d of query row n.
  static __device__ float* result(int d, int n) { return in_holes(d * S::kRows + n); }
  // The largest max of the warps in row n, and a warp's sum relative to it.
  static __device__ int* block_max(int n) {
    return reinterpret_cast<int*>(in_holes(D * S::kRows + n));
  }
  static __device__ float* warp_sum(int warp, int n) {
    return in_holes((D + 1 + warp) * S::kRows + n);
  }
  // A float as an integer of the same order, and back.
  static __device__ int ordered(float x) {
    const int bits = __float_as_int(x);
    return bits ^ (bits >> 31 & INT32_MAX);
  }
  static __device__ float from_ordered(int bits) {
    return __int_as_float(bits ^ (bits >> 31 & INT32_MAX));
  }
  // [warps][kFragments][32]: the rings, while nothing is copied into them.
  static __device__ float4* fragments() { return reinterpret_cast<float4*>(shared() + S::kRing); }
  static __device__ float4* scratch() { return reinterpret_cast<float4*>(shared() + S::kScratch); }
  static __device__ RowInfo* row_info() {
    return reinterpret_cast<RowInfo*>(shared() + S::kRowInfo);
  }

  // -------------------------------------------------------------------------------------- places
  static __device__ int rows_of(const DecodeTask& task, const Segment& s) {
    return min(S::kRows, task.group * static_cast<int>(task.problem.Lq) - s.row_tile * S::kRows);
  }
  // The coordinate of a fragment's first number in a lane; the third is the next coordinate, the
  // second and the fourth are of the next row. The row is 8 · (fragment % kNT) + 2t.
  static __device__ int coordinate(int fragment) {
    return 2 * T::value_coordinate_pair(fragment / kNT, g());
  }
  // The sums that the rank-th of a segment's blocks publishes. On the line a block may publish two,
  // its first and its last segment's: only the last one can be an item's first.
  static __device__ float4* partial_of(const DecodeTask& task, const Segment& s, int rank) {
    int slot = s.first_block + rank;
    if (task.plan.blocks_per_item == 0) slot = 2 * slot + (rank == 0);
    return task.partials + static_cast<int64_t>(slot) * partial_words(D, S::kRows);
  }
  static __device__ float4* result_of(const DecodeTask& task, const Segment& s) {
    return task.results + static_cast<int64_t>(s.first_block) * result_words(D, S::kRows);
  }

  static __device__ void describe_rows(const DecodeTask& task, const Segment& s) {
    const AttentionProblem& p = task.problem;
    const int n = threadIdx.x;
    if (n >= S::kRows) return;
    RowInfo info = {nullptr, 0, 0, 0, 1, kNothing};  // of no row: sees nothing
    if (n < rows_of(task, s)) {
      const int row = s.row_tile * S::kRows + n, token = p.Lq == 1 ? 0 : row / task.group;
      const int head = s.h * task.group + row - token * task.group;
      if (p.mask)
        info.mask = static_cast<const bool*>(p.mask.data) + offset_of(p.mask, s.b, 0, token);
      info.out = offset_of(p.out, s.b, head, token);
      info.lse = (s.b * static_cast<int>(p.Hq) + head) * static_cast<int>(p.Lq) + token;
      info.end = s.length;
      if (p.causal) info.end = s.length - static_cast<int>(p.Lq) + 1 + token;
      if (p.sinks) info.sink = load_element(p.sinks, head * p.sinks.stride[1]) * kLog2e;
    }
    row_info()[n] = info;
    *block_max(n) = ordered(kNothing);
  }

  // What a row's sums are multiplied by at the end. Adds the sink; writes the lse if asked to.
  static __device__ float row_factor(const DecodeTask& task, const RowInfo& row, State all,
                                     bool with_lse) {
    const float most = fmaxf(all.max, row.sink), own = exp2_fast(all.max - most);
    // Nothing seen, and no sink: kNothing - kNothing is 0, but there is nothing to add.
    const float sum = all.sum * own + (row.sink > kNothing ? exp2_fast(row.sink - most) : 0);
    if (with_lse && task.problem.lse)
      task.problem.lse[row.lse] = sum == 0 ? -INFINITY : (most + __log2f(sum)) * (1 / kLog2e);
    return sum == 0 ? 0 : __fdividef(own, sum * (sqrtf(static_cast<float>(D)) * kLevelScale));
  }

  // ------------------------------------------------------------------------------------ exchange
  static __device__ bool is_written(const float4& word) {
    return __float_as_uint(word.x) != kUnwritten;
  }
  // Loads a word again until it is written. False: it took too long.
  static __device__ bool await(const DecodeTask& task, const float4* place, float4* word) {
    if (is_written(*word)) return true;
    const long long start = clock64();
    do {
      if (clock64() - start > task.patience) return false;
      *word = load_word(place);
    } while (!is_written(*word));
    return true;
  }

  // Takes in one more part of the sums of two rows. {max, sum, max, sum}: their states.
  static __device__ void merge(float4* o, float4* all, const float4& more, const float4& part) {
    const float most0 = fmaxf(all->x, part.x), most1 = fmaxf(all->z, part.z);
    const float old0 = exp2_fast(all->x - most0), new0 = exp2_fast(part.x - most0);
    const float old1 = exp2_fast(all->z - most1), new1 = exp2_fast(part.z - most1);
    o->x = o->x * old0 + more.x * new0, o->z = o->z * old0 + more.z * new0;
    o->y = o->y * old1 + more.y * new1, o->w = o->w * old1 + more.w * new1;
    *all = {most0, all->y * old0 + part.y * new0, most1, all->w * old1 + part.w * new1};
  }

  // Jobs rank, rank + blocks, ... below `jobs` are this block's. Its warps form teams that do one
  // each; the members of a team share its job.
  struct Team {
    int members, first, step, member;  // jobs: first, first + step, ...
    __device__ Team(int jobs, const Segment& s) {
      const int warp = threadIdx.x / 32;
      members = s.blocks >= jobs ? S::kWarps : max(S::kWarps / jobs, 1);
      member = warp % members;
      first = s.rank() + warp / members * s.blocks;
      step = S::kWarps / members * s.blocks;
    }
  };

  // Adds up all blocks' sums of this block's fragments, and publishes the results. False: some did
  // not come in time.
  static __device__ bool reduce(const DecodeTask& task, const Segment& s) {
    const Team team(S::kFragments, s);
    const int rows = rows_of(task, s);
    float4* const sums = fragments() + threadIdx.x;  // [warps][32]
    float2* const row_sums = reinterpret_cast<float2*>(fragments() + S::kThreads) + threadIdx.x;
#pragma unroll 1
    for (int base = s.rank(), fragment = team.first; base < S::kFragments;
         base += team.step, fragment += team.step) {
      const int n = 8 * (fragment % kNT) + 2 * t();
      // Lanes of columns that are no query rows have nothing to wait for.
      const bool wanted = fragment < S::kFragments && n < rows;
      float4 total = {}, all = {kNothing, 0, kNothing, 0};
      bool in_time = true;
      __syncthreads();  // whoever still reads what is written below
      if (wanted) {
#pragma unroll 1
        for (int from = team.member; from < s.blocks; from += 2 * team.members) {
          // Two at a time: half the waiting.
          const bool both = from + team.members < s.blocks;
          const float4* const one = partial_of(task, s, from);
          const float4* const two = both ? partial_of(task, s, from + team.members) : one;
          const float4* const places[4] = {
              one + fragment * 32 + lane(), one + result_words(D, S::kRows) + n / 2,
              two + fragment * 32 + lane(), two + result_words(D, S::kRows) + n / 2};
          float4 words[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) words[i] = load_word(places[i]);
#pragma unroll
          for (int i = 0; i < 4; ++i) in_time = in_time && await(task, places[i], &words[i]);
          merge(&total, &all, words[0], words[1]);
          if (both) merge(&total, &all, words[2], words[3]);
        }
        if (g() == 0) {
          atomicMax(block_max(n), ordered(all.x));
          atomicMax(block_max(n + 1), ordered(all.z));
        }
      }
      if (!__syncthreads_and(in_time)) return false;
      const float most0 = from_ordered(*block_max(n)), most1 = from_ordered(*block_max(n + 1));
      const float own0 = exp2_fast(all.x - most0), own1 = exp2_fast(all.z - most1);
      *sums = {total.x * own0, total.y * own1, total.z * own0, total.w * own1};
      *row_sums = {all.y * own0, all.w * own1};
      __syncthreads();
      if (wanted && team.member == 0) {
        total = {};
        float2 sum = {};
#pragma unroll 4
        for (int other = 0; other < team.members; ++other) {
          const float4 o = sums[other * 32];
          const float2 l = row_sums[other * 32];
          total = {total.x + o.x, total.y + o.y, total.z + o.z, total.w + o.w};
          sum = {sum.x + l.x, sum.y + l.y};
        }
        const bool with_lse = fragment < kNT && g() == 0;  // one fragment of each query tile
        const float factor0 = row_factor(task, row_info()[n], {most0, sum.x}, with_lse);
        const float factor1 =
            row_factor(task, row_info()[n + 1], {most1, sum.y}, with_lse && n + 1 < rows);
        store_word(result_of(task, s) + fragment * 32 + lane(),
                   {total.x * factor0, total.y * factor1, total.z * factor0, total.w * factor1});
      }
    }
    return true;
  }

  // Brings together the result of an item that other blocks have parts of. False: some of it did
  // not come in time.
  static __device__ bool collect(const DecodeTask& task, const Segment& s) {
    bool in_time = true;
    const int rows = rows_of(task, s);
#pragma unroll 2
    for (int f = threadIdx.x / 32; f < S::kFragments; f += S::kWarps) {
      const int n = 8 * (f % kNT) + 2 * t(), d = coordinate(f);
      if (n >= rows) continue;
      const float4* const place = result_of(task, s) + f * 32 + lane();
      float4 v = load_word(place);
      in_time = in_time && await(task, place, &v);
      *reinterpret_cast<float2*>(result(d, n)) = {v.x, v.y};
      *reinterpret_cast<float2*>(result(d + 1, n)) = {v.z, v.w};
    }
    return __syncthreads_and(in_time);
  }

  // outᵀ = Πᵀ · result, tiles of 16 coordinates dealt to the item's blocks. Three tf32 products of
  // the numbers' high and low parts make one of 21 bits. False: the result did not come in time.
  static __device__ bool rotate(const DecodeTask& task, const Segment& s) {
    const AttentionProblem& p = task.problem;
    const Team team(S::kTiles, s);
    const int rows = rows_of(task, s);
    bool collected = s.whole();
#pragma unroll 1
    for (int base = s.rank(), tile = team.first; base < S::kTiles;
         base += team.step, tile += team.step) {
      float c[kNT][4] = {};
      // A step is 8 of the D terms of each sum; loads of the first steps run ahead of the waiting.
      constexpr int kAtOnce = 4;
#pragma unroll 1
      for (int step = team.member; step < D / 8 || !collected; step += kAtOnce * team.members) {
        float a[kAtOnce][4] = {};
        const float* pi = p.rotation + (8 * step + t()) * D + 16 * tile + g();
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i, pi += 8 * D * team.members) {
          if (tile >= S::kTiles || step + i * team.members >= D / 8) break;
          a[i][0] = pi[0], a[i][1] = pi[8], a[i][2] = pi[4 * D], a[i][3] = pi[4 * D + 8];
        }
        if (!collected && !collect(task, s)) return false;
        collected = true;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (step + i * team.members >= D / 8) break;
          const int d = 8 * (step + i * team.members) + t();
          float low[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) low[j] = a[i][j] - tf32(a[i][j]);
#pragma unroll
          for (int nt = 0; nt < kNT; ++nt) {
            const float b0 = *result(d, 8 * nt + g()), b1 = *result(d + 4, 8 * nt + g());
            mma_tf32(c[nt], low, b0, b1);
            mma_tf32(c[nt], a[i], b0 - tf32(b0), b1 - tf32(b1));
            mma_tf32(c[nt], a[i], b0, b1);
          }
        }
      }
#pragma unroll
      for (int nt = 0; nt < kNT; ++nt)
        scratch()[(threadIdx.x / 32 * kNT + nt) * 32 + lane()] = {c[nt][0], c[nt][1], c[nt][2],
                                                                  c[nt][3]};
      __syncthreads();
#pragma unroll 1
      for (int x = threadIdx.x; x < S::kThreads / team.members * kNT * 4; x += S::kThreads) {
        // Number `part` of this lane, in the order of c.
        const int part = x / 32 % 4, nt = x / 128 % kNT, of_team = x / (128 * kNT);
        const int n = 8 * nt + 2 * t() + part % 2, of_tile = base + of_team * s.blocks;
        if (n >= rows || of_tile >= S::kTiles) continue;
        float total = 0;
#pragma unroll 4
        for (int m = 0; m < team.members; ++m)
          total += reinterpret_cast<const float*>(
              scratch())[(((of_team * team.members + m) * kNT + nt) * 32 + lane()) * 4 + part];
        const int d = 16 * of_tile + g() + part / 2 * 8;
        store_element(p.out, row_info()[n].out + d * p.out.stride[3], total * row_info()[n].factor);
      }
      __syncthreads();
    }
    return true;
  }

  // The part of a number that tf32 keeps.
  static __device__ float tf32(float x) { return __uint_as_float(__float_as_uint(x) & 0xFFFFE000); }
};

}  // namespace tq::cuda
