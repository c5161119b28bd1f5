// The frame of the decode kernel: its sizes, where things lie in shared memory, and the way from a
// block's sums to the output.
//
// Blocks that share an item exchange through global memory in two steps, in words of 16 bytes: two
// rows of two coordinates.
//   1. each block publishes its sums, and adds up all blocks' sums of some words: the lanes of a
//      warp take a block each and add up among themselves
//   2. what they find is published again; blocks that have something to rotate collect all of it
//      and rotate some groups of 32 coordinates: out = Πᵀ · result
// so a block reads about as much as one block's sums and one result, however many blocks there are.
// No flags: a word is there when it is no longer kUnwritten. Normally all blocks run at once. Where
// other work holds multiprocessors they may not, so no block waits for longer than task.patience:
// then it does its whole item alone, and so whoever waits for it in turn.
//
// At small contexts the time is a chain of latencies, so what does not depend on each other is
// asked for at once and early: the numbers of Π, for example, before the sums are complete. And at
// large ones no spilled register may be read on the way: memory is so busy that one that has left
// the small L1 takes microseconds to come back.
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

// What the block needs to know of a segment, worked out by one warp.
struct alignas(16) Work : Segment {
  UnitSource units[2];        // keys, values
  float4 *partials, *result;  // of the item, see below
  int rows, pairs, words;     // query rows; pairs of them and words that are exchanged
  int team;                   // warps that rotate a group of coordinates together
  int plain_from, plain_to;   // units whose keys all rows see, if there is no softcap
};

// What it needs to know of the task where the kernel's parameter is out of reach: in functions that
// are not compiled into the kernel, so that they do not take registers from each other.
struct alignas(16) Frame {
  const float* rotation;
  const __half* q;
  float* lse;
  View out, mask, sinks;
  int64_t patience;
  int heads, group, tokens;  // query heads, those of a KV head, query tokens
  float softcap;
  bool causal;
};

// Sizes. kNT: tiles of 8 query rows.
template <int D, int kNT>
struct DecodeShape {
  static constexpr int kRows = 8 * kNT;
  static constexpr int kTiles = D / 16;            // of 16 coordinates
  static constexpr int kFragments = kTiles * kNT;  // of the accumulators: 16 x 8 numbers, 4 a lane
  // Accumulators take D/4 · kNT registers a lane. A 16th of the 65536 registers stays free: there
  // a block of rotate_query.cu finds room, so that no decode block has to wait for one.
  static constexpr int kWarps = kNT == 1 && D <= 128 ? 16 : 8;
  static constexpr int kThreads = 32 * kWarps;
  // So many steps of the queries are kept in registers, the rest in shared memory: as many as make
  // no other register spill.
  static constexpr int kQuerySteps = D * kNT <= 256 ? kTiles : kNT == 1 ? 16 : 1;
  static constexpr int kRegisters = D > 256 ? 255 : 65536 / kThreads * 15 / 16;
  // The rotation's pieces: 32 coordinates x 16 rows.
  static constexpr int kOutGroups = (D + 31) / 32;
  static constexpr int kRowTiles = (kRows + 15) / 16;
  static constexpr int kResultStride = D + 4;  // floats: 8 rows x 4 coordinates are in 32 banks
  // Shared memory: the table, the rings, the result, and small things. In the holes of the table:
  // for each warp, scratch of 32 numbers a row.
  static_assert(kWarps * kRows <= 256);
  static constexpr int kStateBytes = (1 + kWarps) * kRows * 4;
  static constexpr int kWorkBytes = 3 * sizeof(Work), kFrameBytes = sizeof(Frame);
  static_assert(kWorkBytes % 16 == 0 && kFrameBytes % 16 == 0);
  static constexpr int kResultBytes = kRows * kResultStride * 4;
  static constexpr int kFixedBytes = Table::kBytes + kResultBytes + kStateBytes +
                                     kRows * static_cast<int>(sizeof(RowInfo)) + kWorkBytes +
                                     kFrameBytes;
  // rotate_query.cu needs some shared memory, too: 3 KB with what the system takes.
  static constexpr int kLimit = 224 * 1024;
  static constexpr int kFit = (kLimit - kFixedBytes) / (kWarps * (Tile<D>::kBytes + 8));
  static constexpr int kSlots = kFit >= 8 ? 8 : kFit / 2 * 2;
  static_assert(kSlots >= 2);
  using Slots = Ring<D, kSlots>;
  static constexpr int kRing = Table::kBytes;
  static constexpr int kResult = kRing + kWarps * Slots::kBytes;
  static constexpr int kStates = kResult + kResultBytes;
  static constexpr int kRowInfo = kStates + kStateBytes;
  static constexpr int kWork = kRowInfo + kRows * static_cast<int>(sizeof(RowInfo));
  static constexpr int kFrame = kWork + kWorkBytes;
  static constexpr int kBarriers = kFrame + kFrameBytes;
  static constexpr int kBytes = kBarriers + kWarps * kSlots * 8;
  static_assert(kBytes <= kLimit);
  static_assert(kFragments * 512 <= Slots::kBytes);  // a warp's accumulators fit into its ring
};

template <int D, int kNT>
struct Finish {
  using S = DecodeShape<D, kNT>;
  using T = Tile<D>;

  // ------------------------------------------------------------------------------ shared memory
  static __device__ char* shared() {
    extern __shared__ __align__(1024) char memory[];
    return memory;
  }
  // The item's result: query row n, coordinate d. The next coordinate follows.
  static __device__ float* result(int n, int d) {
    return reinterpret_cast<float*>(shared() + S::kResult) + n * S::kResultStride + d;
  }
  // The largest max of the warps in row n, and a warp's sum relative to it.
  static __device__ int* block_max(int n) {
    return reinterpret_cast<int*>(shared() + S::kStates) + n;
  }
  static __device__ float* warp_sum(int warp, int n) {
    return reinterpret_cast<float*>(shared() + S::kStates) + (1 + warp) * S::kRows + n;
  }
  // Number i of 32 that a warp has for row n, in a hole of the table. Rows begin in other banks.
  static __device__ float* scratch(int warp, int n, int i) {
    return reinterpret_cast<float*>(shared() + (warp * S::kRows + n) * Table::kStride + 128) +
           (i + 4 * n) % 32;
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
  static __device__ RowInfo* row_info() {
    return reinterpret_cast<RowInfo*>(shared() + S::kRowInfo);
  }
  static __device__ Work* work(int place) {
    return reinterpret_cast<Work*>(shared() + S::kWork) + place;
  }
  static __device__ Frame* frame() { return reinterpret_cast<Frame*>(shared() + S::kFrame); }

  // -------------------------------------------------------------------------------------- places
  // Where a segment's units come from.
  static __device__ UnitSource units_of(const Source& rows, const Source& norms, const Segment& s) {
    const auto at = [&](const Source& source, int unit_bytes) {
      return source.data +
             16 * (static_cast<uint64_t>(source.batch_row) * static_cast<uint32_t>(s.b) +
                   static_cast<uint64_t>(source.head) * static_cast<uint32_t>(s.h)) +
             static_cast<uint64_t>(static_cast<uint32_t>(s.first_unit)) * unit_bytes;
    };
    return {at(rows, T::kUnitBytes), at(norms, kUnit * 2)};
  }
  // What a block publishes: [coordinate pairs, then the states {max, sum, max, sum}][blocks][row
  // pairs], so that whole sectors of memory are written.
  static __device__ float4* partial(const Work& w, int coordinates, int block) {
    return w.partials + (coordinates * w.blocks + block) * w.pairs;
  }
  static __device__ int team_of(int blocks) {
    const int groups = divide_up(S::kOutGroups, blocks);  // for each block
    return groups >= S::kWarps ? 1 : S::kWarps >> (32 - __clz(groups - 1));
  }
  // By one thread.
  static __device__ void describe(const DecodeTask& task, const Segment& s, Work* w) {
    static_cast<Segment&>(*w) = s;
    if (s.blocks == 0) return;
    const AttentionProblem& p = task.problem;
    w->units[0] = units_of(task.k, task.k_norms, s);
    w->units[1] = units_of(task.v, task.v_norms, s);
    w->rows = min(S::kRows, task.group * static_cast<int>(p.Lq) - s.row_tile * S::kRows);
    w->pairs = task.plan.row_pairs, w->words = result_words(D, w->pairs);
    // On the line a block may publish twice, for its first and its last segment, so an item's
    // places are counted from twice its first block.
    const bool line = task.plan.blocks_per_item == 0;
    w->partials = task.partials + static_cast<int64_t>(line ? 2 * s.first_block : s.first_block) *
                                      (w->words + w->pairs);
    w->result = task.results + static_cast<int64_t>(line ? s.first_block : s.item) * w->words;
    const int unseen = p.causal ? static_cast<int>(p.Lq) - 1 : 0;  // by token 0
    const int seen_by_all =
        s.length - (unseen == 0 ? 0 : max(unseen - s.row_tile * S::kRows / task.group, 0));
    w->team = team_of(s.blocks);
    w->plain_from = s.start % kUnit != 0;
    w->plain_to = p.mask || p.softcap != 0 ? 0 : max(seen_by_all, 0) / kUnit - s.first_unit;
  }
  static __device__ void describe(const DecodeTask& task) {
    const AttentionProblem& p = task.problem;
    *frame() = {p.rotation,    task.q,
                p.lse,         p.out,
                p.mask,        p.sinks,
                task.patience, static_cast<int>(p.Hq),
                task.group,    static_cast<int>(p.Lq),
                p.softcap,     p.causal};
  }

  // The rotated queries as the right operands of Sᵀ = K · q̂ᵀ, in the place of the result, which
  // comes later: [steps][query tiles][lanes]. Step j takes the coordinates of bytes 2j and 2j + 1
  // of the lane's quarter of a key. Then their scales.
  static __device__ uint2* query(int step, int nt) {
    return reinterpret_cast<uint2*>(shared() + S::kResult) + (step * kNT + nt) * 32;
  }
  static __device__ float* query_scale(int n) {
    return reinterpret_cast<float*>(shared() + S::kResult + S::kRows * D * 2) + n;
  }
  // What each thread carries of them from global to shared memory.
  static constexpr int kQueryPieces = S::kRows * query_stride(D) / 8;
  struct Queries {
    uint4 piece[(kQueryPieces + S::kThreads - 1) / S::kThreads];
  };
  static __device__ Queries load_queries(const Work& w) {
    Queries q;
    const int pieces = w.rows * (query_stride(D) / 8);
    const uint4* from =
        reinterpret_cast<const uint4*>(frame()->q) + static_cast<int64_t>(w.item) * kQueryPieces;
    int i = Thread().x;
    for (uint4& piece : q.piece) piece = i < pieces ? from[i] : uint4{}, i += S::kThreads;
    return q;
  }
  static __device__ void keep_queries(const Queries& q) {
    constexpr int kOfRow = query_stride(D) / 8;
    int i = Thread().x;
    for (const uint4& piece : q.piece) {
      const int n = i / kOfRow, byte = i % kOfRow * 4;  // of a key, which are two coordinates each
      if (i < kQueryPieces && byte < T::kRow) {
        const uint2 parts[2] = {{piece.x, piece.y}, {piece.z, piece.w}};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int chunk = (byte + 2 * half) / T::kKeyChunk,
                    within = (byte + 2 * half) % T::kKeyChunk;
          const int step = (chunk / 4 * T::kKeyChunk + within) / 2;
          query(step, n / 8)[n % 8 * 4 + chunk % 4] = parts[half];
        }
      } else if (i < kQueryPieces) {
        *query_scale(n) = fmaxf(__uint_as_float(piece.x), 1e-30f);
      }
      i += S::kThreads;
    }
  }

  static __device__ void write_result(int word, float4 v) {
    const int n = word / (D / 2) * 2, d = word % (D / 2) * 2;
    *reinterpret_cast<float2*>(result(n, d)) = {v.x, v.z};
    *reinterpret_cast<float2*>(result(n + 1, d)) = {v.y, v.w};
  }

  static __device__ void describe_rows(const Work& w) {
    const Frame& f = *frame();
    const int n = Thread().x - (S::kThreads - 32);  // the last warp, the first to be idle
    if (n < 0 || n >= S::kRows) return;
    RowInfo info = {nullptr, 0, 0, 0, 1, kNothing};  // of no row: sees nothing
    if (n < w.rows) {
      const int row = w.row_tile * S::kRows + n, token = f.tokens == 1 ? 0 : row / f.group;
      const int head = w.h * f.group + row - token * f.group;
      if (f.mask)
        info.mask = static_cast<const bool*>(f.mask.data) + offset_of(f.mask, w.b, 0, token);
      info.out = offset_of(f.out, w.b, head, token);
      info.lse = (w.b * f.heads + head) * f.tokens + token;
      info.end = w.length;
      if (f.causal) info.end = w.length - f.tokens + 1 + token;
      if (f.sinks) info.sink = load_element(f.sinks, head * f.sinks.stride[1]) * kLog2e;
    }
    row_info()[n] = info;
    *block_max(n) = ordered(kNothing);
  }

  // What a row's sums are multiplied by at the end. Adds the sink; writes the lse if asked to.
  static __device__ float row_factor(const RowInfo& row, State all, bool with_lse) {
    const float most = fmaxf(all.max, row.sink), own = exp2_fast(all.max - most);
    // Nothing seen, and no sink: kNothing - kNothing is 0, but there is nothing to add.
    const float sum = all.sum * own + (row.sink > kNothing ? exp2_fast(row.sink - most) : 0);
    if (float* const lse = frame()->lse; with_lse && lse)
      lse[row.lse] = sum == 0 ? -INFINITY : (most + __log2f(sum)) * (1 / kLog2e);
    return sum == 0 ? 0 : __fdividef(own, sum * (sqrtf(static_cast<float>(D)) * kLevelScale));
  }

  // ------------------------------------------------------------------------------------ exchange
  static __device__ bool is_written(const float4& word) {
    return __float_as_uint(word.x) != kUnwritten;
  }
  // Loads a word again until it is written. False: it took too long.
  static __device__ bool await(const float4* place, float4* word) {
    if (is_written(*word)) return true;
    const long long start = clock64();
    do {
      if (clock64() - start > frame()->patience) return false;
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

  // ------------------------------------------------------------------------------------ rotation
  // outᵀ = Πᵀ · result, 16 rows x 32 coordinates at a time, in steps of 8 terms. (Four tiles of 8
  // coordinates: tile j has every fourth one from the j-th on, so that a lane's numbers of Π for
  // all four lie next to each other.) Such groups are dealt to the item's blocks, and to teams of
  // warps in a block, which share the steps. Three tf32 products of the numbers' high and low parts
  // make one of 21 bits.
  struct Rotation {
    static constexpr int kSteps = D / 8, kAtOnce = 4;
    struct Numbers {
      float4 of[kAtOnce][2];
    };

    Thread me;
    int stride, rank;                   // between this block's groups; its first group
    int members, member, teams, group;  // of a team; of this warp

    __device__ Rotation(const Work& w, bool wanted)
        : stride(w.blocks), rank(w.rank), members(w.team) {
      const int shift = 31 - __clz(members);
      teams = S::kWarps >> shift, member = me.warp & (members - 1);
      group = wanted ? rank + (me.warp >> shift) * stride : S::kOutGroups;
    }

    // A lane's numbers of Π for some steps of a group of coordinates.
    __device__ void load(int of_group, int step, Numbers& pi) const {
      const int d = 32 * of_group + 4 * me.g;
      const float* from = frame()->rotation + (8 * step + me.t) * D + d;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i, from += members * 8 * D)
        if (d < D && step + i * members < kSteps) {
          pi.of[i][0] = *reinterpret_cast<const float4*>(from);
          pi.of[i][1] = *reinterpret_cast<const float4*>(from + 4 * D);
        } else {
          pi.of[i][0] = pi.of[i][1] = {};
        }
    }

    // `pi`: the first ones.
    __device__ void run(const Work& w, Numbers& pi) const {
      bool first = true;
#pragma unroll 1
      for (int base = rank, at_group = group; base < S::kOutGroups;
           base += teams * stride, at_group += teams * stride) {
        float c[S::kRowTiles][4][4] = {};
#pragma unroll 1
        for (int step = member; step < kSteps; step += kAtOnce * members) {
          if (!first) load(at_group, step, pi);
          first = false;
          const float* at = result(me.g, 8 * step + me.t);
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i, at += members * 8) {
            if (step + i * members >= kSteps) break;
            const float4 one = pi.of[i][0], two = pi.of[i][1];
            const float b[4][2] = {{one.x, two.x}, {one.y, two.y}, {one.z, two.z}, {one.w, two.w}};
#pragma unroll
            for (int m = 0; m < S::kRowTiles; ++m) {
              float a[4], low[4];
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                const int n = 16 * m + 8 * (j % 2);
                a[j] = n < S::kRows ? at[n * S::kResultStride + j / 2 * 4] : 0;
                low[j] = a[j] - tf32(a[j]);
              }
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                mma_tf32(c[m][j], low, b[j][0], b[j][1]);
                mma_tf32(c[m][j], a, b[j][0] - tf32(b[j][0]), b[j][1] - tf32(b[j][1]));
                mma_tf32(c[m][j], a, b[j][0], b[j][1]);
              }
            }
          }
        }
        // Column 2t of tile j is coordinate 8t + j.
#pragma unroll
        for (int m = 0; m < S::kRowTiles; ++m)
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const int n = 16 * m + i / 2 * 8 + me.g, d = 8 * me.t + i % 2 * 4;
            if (n < S::kRows)
              *reinterpret_cast<float4*>(scratch(me.warp, n, d)) = {c[m][0][i], c[m][1][i],
                                                                    c[m][2][i], c[m][3][i]};
          }
        __syncthreads();
#pragma unroll 1
        for (int x = me.x; x < teams * S::kRows * 32; x += S::kThreads) {
          const int team = x / (S::kRows * 32), n = x / 32 % S::kRows;
          const int d = 32 * (base + team * stride) + x % 32;
          if (n >= w.rows || d >= D) continue;
          float total = 0;
#pragma unroll 4
          for (int m = 0; m < members; ++m) total += *scratch(team * members + m, n, x % 32);
          const RowInfo& row = row_info()[n];
          const View& out = frame()->out;
          store_element(out, row.out + d * out.stride[3], total * row.factor);
        }
        __syncthreads();
      }
    }
  };

  // The part of a number that tf32 keeps.
  static __device__ float tf32(float x) { return __uint_as_float(__float_as_uint(x) & 0xFFFFE000); }

  // ------------------------------------------------------------------------------------- the end
  // Brings a segment that is one of several of its item to an end, or one of the two steps of it;
  // or rotates one that is whole. False: words of other blocks did not come in time (`in_time`: nor
  // did they in an earlier step). A function of its own, for all of a block's threads.
  enum Steps { kReduce = 1, kCollect = 2, kRotate = 4 };
  static __device__ __noinline__ bool finish(int place, int steps, bool in_time) {
    const Work& w = *work(place);
    const Rotation rotation(w, steps & kRotate);
    typename Rotation::Numbers pi;  // takes as long to come as words do, so is asked for early
    rotation.load(rotation.group, rotation.member, pi);
    if (steps & kReduce) in_time = reduce(w);
    if (!(steps & kRotate)) return in_time;
    if (w.rank >= S::kOutGroups) return true;  // nothing to rotate
    if (steps & kCollect && !collect(w, in_time)) return false;
    rotation.run(w, pi);
    return true;
  }

  // Adds up all blocks' sums of this block's words, and publishes the results. False: some did not
  // come in time. Needs no other warp.
  static __device__ bool reduce(const Work& w) {
    // A team of lanes does a word: as many as there are blocks, rounded up to a power of two. Long
    // results are done in batches: their words are asked for together.
    constexpr int kBatch = D > 256 ? 2 : 1;
    const Thread me;
    const int blocks = w.blocks, words = w.words, rank = w.rank;
    const int team = blocks >= 32 ? 32 : 2 << (31 - __clz(blocks - 1));
    const int per_warp = 32 / team, member = me.lane & (team - 1);
    bool in_time = true;
#pragma unroll 1
    for (int base = uniform(me.warp) * per_warp; base * blocks + rank < words;
         base += S::kWarps * per_warp * kBatch) {
      int word[kBatch];
      float4 total[kBatch], all[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        word[i] = (base + i * S::kWarps * per_warp + me.lane / team) * blocks + rank;
        total[i] = {}, all[i] = {kNothing, 0, kNothing, 0};
      }
#pragma unroll 1
      for (int from = member; from < blocks; from += 2 * team) {
        float4 sums[kBatch][2], states[kBatch][2];
        const auto wanted = [&](int i, int j) {
          return word[i] < words && from + j * team < blocks;
        };
        const auto place = [&](int i, int j) {
          return partial(w, word[i] % (D / 2), from + j * team) + word[i] / (D / 2);
        };
        const auto state = [&](int i, int j) {
          return partial(w, D / 2, from + j * team) + word[i] / (D / 2);
        };
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
#pragma unroll
          for (int j = 0; j < 2; ++j)
            if (wanted(i, j))
              sums[i][j] = load_word(place(i, j)), states[i][j] = load_word(state(i, j));
#pragma unroll
        for (int i = 0; i < kBatch; ++i)
#pragma unroll
          for (int j = 0; j < 2; ++j)
            if (wanted(i, j)) {
              in_time = in_time && await(place(i, j), &sums[i][j]);
              in_time = in_time && await(state(i, j), &states[i][j]);
              merge(&total[i], &all[i], sums[i][j], states[i][j]);
            }
      }
      __syncwarp();
      float most[kBatch][2], sum[kBatch][6];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) most[i][0] = all[i].x, most[i][1] = all[i].z;
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2)
        if (lanes < team)
#pragma unroll
          for (int i = 0; i < kBatch; ++i)
#pragma unroll
            for (int c = 0; c < 2; ++c)
              most[i][c] = fmaxf(most[i][c], __shfl_xor_sync(~0u, most[i][c], lanes));
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const float own0 = exp2_fast(all[i].x - most[i][0]);
        const float own1 = exp2_fast(all[i].z - most[i][1]);
        sum[i][0] = total[i].x * own0, sum[i][1] = total[i].y * own1;
        sum[i][2] = total[i].z * own0, sum[i][3] = total[i].w * own1;
        sum[i][4] = all[i].y * own0, sum[i][5] = all[i].w * own1;
      }
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2)
        if (lanes < team)
#pragma unroll
          for (int i = 0; i < kBatch; ++i)
#pragma unroll
            for (int c = 0; c < 6; ++c) sum[i][c] += __shfl_xor_sync(~0u, sum[i][c], lanes);
      in_time = __all_sync(~0u, in_time);
#pragma unroll
      for (int i = 0; i < kBatch; ++i)
        if (word[i] < words && member == 0 && in_time) {
          const int n = word[i] / (D / 2) * 2;
          const int rows = word[i] % (D / 2) == 0 ? w.rows : 0;  // with an lse
          const float factor0 = row_factor(row_info()[n], {most[i][0], sum[i][4]}, n < rows);
          const float factor1 =
              row_factor(row_info()[n + 1], {most[i][1], sum[i][5]}, n + 1 < rows);
          store_word(w.result + word[i], {sum[i][0] * factor0, sum[i][1] * factor1,
                                          sum[i][2] * factor0, sum[i][3] * factor1});
        }
    }
    return in_time;
  }

  // Brings together the result of an item that other blocks have parts of. False: some of it did
  // not come in time, or `in_time` was false in some thread before.
  static __device__ bool collect(const Work& w, bool in_time) {
#pragma unroll 1
    for (int word = Thread().x; word < w.words; word += S::kThreads) {
      float4 v = load_word(w.result + word);
      in_time = in_time && await(w.result + word, &v);
      write_result(word, v);
    }
    return __syncthreads_and(in_time);
  }
};

}  // namespace tq::cuda
