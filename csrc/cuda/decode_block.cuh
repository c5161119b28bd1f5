// The frame of the decode kernel: its sizes, where things lie in shared memory, and the
// descriptions that its parts find there. They are separate functions, so that none takes registers
// from another (decode_warps.cuh), and what they know of the task is in shared memory, near.
#pragma once

#include "decode.h"
#include "device/element.cuh"
#include "device/ptx.cuh"
#include "device/ring.cuh"
#include "device/schedule.cuh"
#include "device/table.cuh"
#include "device/tile.cuh"

namespace tq::cuda {

// There are two kinds of these kernels. One needs Hopper or its successors in data centres: bulk
// copies, and 227 KB of shared memory. The portable kind runs from sm_80 on with the 99 KB that
// each block may have there, so with fewer warps. Compiled for an architecture, one of them is
// empty.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
inline constexpr bool kPortableHere = true;
#else
inline constexpr bool kPortableHere = false;
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
  int warps;                  // that have units
  int rows, pairs, words;     // query rows; pairs of them and words that are exchanged
  int team;                   // warps that rotate a group of coordinates together
  bool direct;                // blocks that rotate read all the sums themselves
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

// Where a lane finds its bytes in a unit (device/tile.cuh): of a key tile's first row, of a value
// tile's even and odd row.
struct alignas(16) Places {
  int key, even, odd;
};

// Sizes. kNT: tiles of 8 query rows.
template <int D, int kNT, bool kPortable>
struct DecodeShape {
  static constexpr int kRows = 8 * kNT;
  static constexpr int kTiles = D / 16;  // of 16 coordinates
  // Accumulators take D/4 · kNT registers a lane. A 16th of the 65536 registers stays free: there
  // a block of rotate_query.cu finds room, so that no decode block has to wait for one.
  static constexpr int kWarps = kPortable ? portable_warps(D) : kNT == 1 && D <= 128 ? 16 : 8;
  static constexpr int kThreads = 32 * kWarps;
  // So many steps of the queries are kept in registers, the rest in shared memory: as many as make
  // no other register spill.
  static constexpr int kQuerySteps = D * kNT <= 256 ? kTiles : kNT == 1 ? 16 : 1;
  static constexpr int kRegisters = kPortable ? 255 : 65536 / kThreads * 15 / 16;
  // The rotation's pieces: 32 coordinates x 16 rows.
  static constexpr int kOutGroups = (D + 31) / 32;
  static constexpr int kRowTiles = (kRows + 15) / 16;
  // So many words a block reads in less time than it takes to exchange twice.
  static constexpr int kDirectWords = 8 * kThreads;
  static constexpr int kResultStride = D + 4;  // floats: 8 rows x 4 coordinates are in 32 banks
  // Shared memory: the table, the rings, the result, and small things. In the holes of the table:
  // for each warp, scratch of 32 numbers a row.
  static_assert(kWarps * kRows <= 256);
  static constexpr int kStateBytes = (1 + kWarps) * kRows * 4;
  static constexpr int kWorkBytes = 3 * sizeof(Work), kFrameBytes = sizeof(Frame);
  static constexpr int kPlacesBytes = 32 * static_cast<int>(sizeof(Places));
  static_assert(kWorkBytes % 16 == 0 && kFrameBytes % 16 == 0);
  static constexpr int kResultBytes = kRows * kResultStride * 4;
  // rotate_query.cu needs some shared memory, too: 3 KB with what the system takes.
  static constexpr int kLimit = kPortable ? kPortableLimit : 224 * 1024;
  // So many units ahead that 64 KB are under way: enough for any memory. (More than the copy engine
  // takes would block its queue, and with it every other access to shared memory.)
  static constexpr int kUnitBytes = kWarps * 2 * Tile<D>::kBytes;
  static constexpr int kAhead = kPortable ? 1 : (64 * 1024 + kUnitBytes - 1) / kUnitBytes;
  // In the end the rings hold the warps' sums: for each pair of rows, a word for each pair of
  // coordinates, with gaps so that pairs of rows begin in other banks. Where there are more threads
  // than words, four share one and read four warps' words at once, which must not share banks
  // either.
  static constexpr int kShare = kNT == 1 && kWarps == 16 ? 4 : 1;
  static constexpr int kPairWords = D / 2 + 2, kWarpGap = kShare > 1 ? 2 : 0;
  static constexpr int kSumsBytes = (kRows / 2 * kPairWords + kWarpGap) * 16;
  static constexpr int kHolding = (kSumsBytes + 2 * Tile<D>::kBytes - 1) / (2 * Tile<D>::kBytes);
  static constexpr int kSlots = 2 * (kAhead > kHolding ? kAhead : kHolding);
  using Slots = std::conditional_t<kPortable, PortableRing<D, kSlots>, Ring<D, kSlots>>;
  static constexpr int kRing = Table::kBytes;
  static constexpr int kResult = kRing + kWarps * Slots::kBytes;
  static constexpr int kStates = kResult + kResultBytes;
  static constexpr int kRowInfo = kStates + kStateBytes;
  static constexpr int kWork = kRowInfo + kRows * static_cast<int>(sizeof(RowInfo));
  static constexpr int kFrame = kWork + kWorkBytes;
  static constexpr int kPlaces = kFrame + kFrameBytes;
  static constexpr int kBarriers = kPlaces + kPlacesBytes;
  static constexpr int kBytes = kBarriers + kWarps * kSlots * 8;
  static_assert(kBytes <= kLimit);
  static_assert(kSumsBytes <= Slots::kBytes);
};

template <int D, int kNT, bool kPortable>
struct Block {
  using S = DecodeShape<D, kNT, kPortable>;
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
  // A word of it, as blocks exchange them: a pair of rows, a pair of coordinates. Words follow each
  // other as the accumulators hold them: by lane groups, then by tiles, then by rows.
  static __device__ void write_result(int word, float4 v) {
    const int c = word % (D / 2), n = word / (D / 2) * 2;
    const int d = 2 * T::value_coordinate_pair(c / 8, c % 8);
    *reinterpret_cast<float2*>(result(n, d)) = {v.x, v.z};
    *reinterpret_cast<float2*>(result(n + 1, d)) = {v.y, v.w};
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
  // A warp's word, where the rings are while nothing is copied into them.
  static __device__ float4* word_of_warp(int pairs, int warp, int word) {
    return reinterpret_cast<float4*>(shared() + S::kRing) +
           warp * (pairs * S::kPairWords + S::kWarpGap) + word / (D / 2) * S::kPairWords +
           word % (D / 2);
  }
  static __device__ RowInfo* row_info() {
    return reinterpret_cast<RowInfo*>(shared() + S::kRowInfo);
  }
  static __device__ Work* work(int place) {
    return reinterpret_cast<Work*>(shared() + S::kWork) + place;
  }
  static __device__ Places* places() { return reinterpret_cast<Places*>(shared() + S::kPlaces); }
  static __device__ Frame* frame() { return reinterpret_cast<Frame*>(shared() + S::kFrame); }

  // ------------------------------------------------------------------------------- descriptions
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
  // What a block publishes: [words' coordinate pairs, then the states {max, sum, max, sum}][blocks]
  // [row pairs], so that whole sectors of memory are written.
  static __device__ float4* partial(const Work& w, int coordinates, int block) {
    return w.partials + (coordinates * w.blocks + block) * w.pairs;
  }
  // Warps for each group of coordinates that a block rotates, where so many blocks share an item.
  static __device__ int team_of(int blocks) {
    if (blocks >= S::kOutGroups) return S::kWarps;
    const int groups = divide_up(S::kOutGroups, blocks);  // for each block
    return groups >= S::kWarps ? 1 : S::kWarps >> (32 - __clz(groups - 1));
  }
  // A segment, by one thread.
  static __device__ void describe(const DecodeTask& task, const Segment& s, Work* w) {
    static_cast<Segment&>(*w) = s;
    if (s.blocks == 0) return;
    const AttentionProblem& p = task.problem;
    w->units[0] = units_of(task.k, task.k_norms, s);
    w->units[1] = units_of(task.v, task.v_norms, s);
    w->warps = min(s.to - s.from, S::kWarps);
    w->rows = min(S::kRows, task.group * static_cast<int>(p.Lq) - s.row_tile * S::kRows);
    w->pairs = task.plan.row_pairs, w->words = result_words(D, w->pairs);
    // On the line a block may publish twice, for its first and its last segment, so an item's
    // places are counted from twice its first block.
    const bool line = task.plan.blocks_per_item == 0;
    w->partials = task.partials + static_cast<int64_t>(line ? 2 * s.first_block : s.first_block) *
                                      partial_words(D, w->pairs);
    w->result = task.results + static_cast<int64_t>(line ? s.first_block : s.item) * w->words;
    const int unseen = p.causal ? static_cast<int>(p.Lq) - 1 : 0;  // by token 0
    const int seen_by_all =
        s.length - (unseen == 0 ? 0 : max(unseen - s.row_tile * S::kRows / task.group, 0));
    w->team = team_of(s.blocks);
    w->direct = !line && w->words * s.blocks <= S::kDirectWords;
    w->plain_from = s.start % kUnit != 0;
    w->plain_to = p.mask || p.softcap != 0 ? 0 : max(seen_by_all, 0) / kUnit - s.first_unit;
  }
  // The lanes' places, by one warp.
  static __device__ void describe_places() {
    const Thread me;
    if (me.warp == S::kWarps - 1)
      places()[me.lane] = {
          T::Keys::offset(T::position(0, me.g)) + T::key_byte(0, me.t),
          T::Values::offset(T::position(0, 2 * me.t)) + T::value_byte(0, me.g),
          T::Values::offset(T::position(0, 2 * me.t + 1)) + T::value_byte(0, me.g)};
  }
  // The task, by one thread.
  static __device__ void describe(const DecodeTask& task) {
    const AttentionProblem& p = task.problem;
    *frame() = {p.rotation,    task.q,
                p.lse,         p.out,
                p.mask,        p.sinks,
                task.patience, static_cast<int>(p.Hq),
                task.group,    static_cast<int>(p.Lq),
                p.softcap,     p.causal};
  }

  // The rows of a segment, by the last warp, the first to be idle.
  static __device__ void describe_rows(const Work& w) {
    const Frame& f = *frame();
    const int n = Thread().x - (S::kThreads - 32);
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

  // ------------------------------------------------------------------------------------ queries
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
        // Positive, so that a hidden score of -inf stays what it is, and 1 over it is finite.
        *query_scale(n) = fmaxf(__uint_as_float(piece.x), 1e-30f);
      }
      i += S::kThreads;
    }
  }
};

}  // namespace tq::cuda
