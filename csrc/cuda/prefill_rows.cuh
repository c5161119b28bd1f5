// What the prefill kernels share: which rows a block takes and which keys they see, the softmax of
// a warp's 16 rows and a tile of keys, the sums of splits, and the ways of queries and results.
// Four warps are a group, on Hopper a warpgroup; thread (g, t) = (lane / 4, lane % 4) has rows g
// and g + 8 of its warp's, and columns 8 j + 2 t and 8 j + 2 t + 1, as products leave them.
#pragma once

#include "prefill_images.cuh"

namespace tq::cuda {

// One tile of rows, and the tiles of keys that it sees, as all warps of a block find it.
struct RowTile : KeyRange {
  int images;                 // where tile 0 of its keys would be among those in the workspace
  int item, part;             // of all row tiles and windows; of the round's
  int split, splits;          // of the row tile's keys
  int first_row, begin, end;  // of the KV head's; tiles of keys
  bool more;                  // keys in the windows to come
  const Sight* sights;        // of each tile, if there is a mask
};

// Shared memory of a group for adding up splits.
constexpr int kMergeBytes = 64 * 16 + 16 * 8;

__device__ inline float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// kParts: a tile of keys is multiplied in so many parts.
template <int D, int kParts = 1>
class PrefillRows {
 protected:
  static constexpr int kKeys = prefill_keys(D), kPart = kKeys / kParts, kQuarters = 4 / kParts;

  __device__ PrefillRows(const PrefillTask& task, char* memory)
      : task_(task), shared_(shared_address(memory)) {}

  // The n-th tile of rows of this block; false: there is none.
  __device__ bool find_rows(int n, RowTile* at) const {
    const AttentionProblem& p = task_.problem;
    // Back and forth, for each tile has fewer keys than the one before.
    int i = n * gridDim.x + (n % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    if (i >= round_.heads * round_.row_tiles * round_.splits) return false;
    at->split = i % round_.splits, i /= round_.splits;
    const int slot = i % round_.heads;
    const int head = round_.first + slot, heads = static_cast<int>(p.Hkv);
    static_cast<KeyRange&>(*at) = KeyRange(p, head / heads, head % heads);
    at->images = slot * round_.tiles - round_.tile;
    const int row_of_round = round_.row_tiles - 1 - i / round_.heads;
    const int row_tile = round_.row_tile + row_of_round;
    at->item = (round_.window * task_.heads() + head) * task_.row_tiles + row_tile;
    at->part = slot * round_.row_tiles + row_of_round;
    at->first_row = row_tile * prefill_rows(D);
    if (task_.sights)
      at->sights =
          task_.sights +
          (static_cast<int64_t>(p.mask.stride[0] ? at->b : 0) * task_.row_tiles + row_tile) *
              task_.key_tiles;
    const int end = end_of(*at, min(at->first_row + prefill_rows(D), rows()) - 1);
    at->begin = at->start < end ? at->start / kKeys : 0;
    at->end = at->start < end ? (end + kKeys - 1) / kKeys : 0;
    // What has no keys in this window, nor in those to come, is done; so are all tiles of rows that
    // follow, for they have no more.
    if (round_.window > 0 && at->end <= round_.tile) return false;
    const int after = round_.tile + round_.tiles;
    at->more = at->end > after;
    at->begin = min(max(at->begin, round_.tile), after), at->end = min(at->end, after);
    const int tiles = at->end - at->begin;
    const int each = tiles <= unsplit_tiles(D)
                         ? max(tiles, 1)
                         : max((tiles + round_.splits - 1) / round_.splits, kLeastSplit);
    at->splits = max((tiles + each - 1) / each, 1);
    at->begin += at->split * each;
    at->end = min(at->begin + each, at->end);
    return at->split < at->splits;  // where there are splits, a block has one tile of rows
  }
  // The last tile up to j that some row may see; or the one before the first.
  __device__ int last_seen(const RowTile& at, int j) const {
    if (task_.sights)
      while (j >= at.begin && at.sights[j] == kNone) --j;
    return j;
  }
  // Of a KV head.
  __device__ int rows() const { return task_.group * static_cast<int>(task_.problem.Lq); }
  // A row sees keys below this one.
  __device__ int end_of(const RowTile& at, int row) const {
    const AttentionProblem& p = task_.problem;
    if (!p.causal) return at.length;
    return max(at.length - static_cast<int>(p.Lq) + row / task_.group + 1, 0);
  }

  __device__ const uint16_t* row_of(const View& v, const RowTile& at, int row) const {
    const int token = row / task_.group, head = at.h * task_.group + row - token * task_.group;
    return static_cast<const uint16_t*>(v.data) + offset_of(v, at.b, head, token);
  }

  // Where piece `piece` of 16 bytes of a row lies in images of 64 rows at a shared address.
  static __device__ uint32_t piece_at(uint32_t image, int row, int piece) {
    return image + piece / 8 * (64 * 128) + row * 128 + ((piece ^ row) & 7) * 16;
  }

  // A warp's 16 queries to its rows of an image, a lane 16 bytes of them at a time: pieces `first`,
  // `first` + `step`, ... of two rows.
  __device__ void fetch_query(const RowTile& at, uint32_t image, int first, int step) const {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = min(at.first_row + row_in_tile_ + 8 * r, rows() - 1);
      const auto* const from = reinterpret_cast<const uint4*>(row_of(task_.problem.query, at, row));
#pragma unroll
      for (int piece = first; piece < D / 8; piece += step) {
        const uint4 x = __ldg(from + piece);
        store_shared4(piece_at(image, row_in_tile_ % 64 + 8 * r, piece), {x.x, x.y, x.z, x.w});
      }
    }
  }
  // As operand A.
  __device__ void read_query(uint32_t image, uint32_t (&a)[D / 16][4]) const {
    const int lane = 4 * g_ + t_, row_of_warp = row_in_tile_ % 64 - g_;
#pragma unroll
    for (int i = 0; i < D / 16; ++i)
      load_matrices(a[i], piece_at(image, row_of_warp + lane % 16, 2 * i + lane / 16));
  }

  // What makes products with q̂ scores, and what makes products with the rotation q̂: of length 2^8,
  // with the sign of a negative scale, so that larger scores are larger products.
  __device__ void find_factors(const RowTile& at, const Lengths& lengths, float (&scale)[2]) {
    const AttentionProblem& p = task_.problem;
    const float unit = p.scale < 0 ? -0x1p8f : 0x1p8f;
    const float of_keys = __uint_as_float(norm_exponent(p.k_norms, at) << 23) * level_;
    for (int r = 0; r < 2; ++r) {
      const float factor = lengths.norm[r] * (p.scale * kLog2e / unit) * of_keys;
      // Positive, so that scores keep their order. A query with NaN has it in q̂, not here, where it
      // would reach hidden keys.
      const bool finite = fabsf(factor) < INFINITY;
      factor_[r] = finite ? fmaxf(factor, 1e-37f) : 1;
      scale[r] = finite ? lengths.inverse[r] * unit : NAN;
    }
  }

  // What the sums so far are to be multiplied by.
  struct Growth {
    float of[2];
  };

  // Of the quarters of a tile that are in a part: whether norms come beside.
  struct Flags {
    uint32_t of[kQuarters];
    __device__ explicit Flags(uint32_t norms, int part = 0) {
      load_words(of, norms + part % kParts * (4 * kQuarters));
    }
    __device__ bool any() const {
      return of[0] | of[1 % kQuarters] | of[2 % kQuarters] | of[3 % kQuarters];
    }
  };
  // Expanded tile j, in the workspace.
  __device__ const char* tile_at(const RowTile& at, int j) const {
    return task_.tiles + static_cast<int64_t>(at.images + j) * tile_bytes_of(D);
  }
  // Its flags: each lane has one of the flags of keys and values.
  __device__ uint32_t load_flag(const RowTile& at, int j) const {
    const int i = threadIdx.x % 8;
    const char* const norms = tile_at(at, j) + 2 * image_bytes_of(D) + i / 4 * key_norm_bytes_of(D);
    return __ldcg(reinterpret_cast<const uint32_t*>(norms) + i % 4);
  }
  // The sums of a warp's rows as operand A, brought to fp16 (`finish`).
  template <int kSteps>
  static __device__ void make_operand(const float (&o)[8 * kSteps], const float (&down)[2],
                                      uint32_t (&a)[kSteps][4]) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        a[i][k] = half_pair(o[8 * i + 2 * k] * down[k % 2], o[8 * i + 2 * k + 1] * down[k % 2]);
  }

  // Arrives on the barrier of a place that is free again (Hopper's rings), for 128: each thread, if
  // all have read norms.
  __device__ void release_to(uint32_t barrier) const {
    if (far_)
      barrier_arrive(barrier);
    else if (threadIdx.x % 128 == 0)
      barrier_arrive(barrier, 128);
  }

  // Scores of part `part` of all tiles' to weights (times values' norms, where they come beside),
  // relative to the maximum. `agree` may raise the part's own maxima of both rows, known to all
  // lanes.
  template <class Agree>
  __device__ Growth soften(const RowTile& at, int part, uint32_t norms, float (&s)[kPart / 2],
                           Agree agree) {
    const uint32_t of_values = norms + key_norm_bytes_of(D),
                   each = 16 + part % kParts * (4 * kPart);
    const int first = part * kPart;
    const bool all_seen = first >= at.start && first + kPart <= min(end_[0], end_[1]) &&
                          (!task_.sights || at.sights[part / kParts] == kAll);
    float factor[2] = {factor_[0], factor_[1]};
    // One branch over all that is rare.
    const bool softcap = task_.problem.softcap != 0;
    if (!__all_sync(~0u, all_seen && !far_ && !softcap)) [[unlikely]] {
      if (far_) for_far(Flags(norms, part), norms + each, [&](int i, float norm) { s[i] *= norm; });
      if (softcap) cap(s, factor);
      if (far_) {
#pragma unroll
        for (int i = 0; i < kPart / 2; ++i) s[i] *= factor[i / 2 % 2];
        factor[0] = factor[1] = 1;
        for_far(Flags(of_values, part), of_values + each, [&](int i, float log) { s[i] += log; });
      }
      if (!__all_sync(~0u, all_seen)) hide(at, first, s);
    }

    float most[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int i = 0; i < kPart / 2; ++i) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], s[i]);
    for (int r = 0; r < 2; ++r) most[r] = quad_max(most[r]) * factor[r];
    agree(most);
    Growth grow;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float top = fmaxf(max_[r], most[r]);
      grow.of[r] = exp2_fast(max_[r] - top);
      max_[r] = top;
    }
    float sum[4] = {};  // even keys of two rows, then odd ones
#pragma unroll
    for (int i = 0; i < kPart / 2; ++i) {
      s[i] = exp2_fast(fmaf(s[i], factor[i / 2 % 2], -max_[i / 2 % 2]));
      sum[i / 2 % 2 + i % 2 * 2] += s[i];
    }
    if (far_) [[unlikely]] {  // again, without the sizes of values
      const Flags far(of_values, part);
#pragma unroll
      for (int k = 0; k < 4; ++k) sum[k] = 0;
#pragma unroll
      for (int i = 0; i < kPart / 2; ++i) sum[i / 2 % 2] += far.of[i / (kKeys / 8)] ? 0 : s[i];
      for_far(far, of_values + each + 4 * kKeys,
              [&](int i, float inverse) { sum[i / 2 % 2] = fmaf(s[i], inverse, sum[i / 2 % 2]); });
    }
    for (int r = 0; r < 2; ++r) sum_[r] = fmaf(sum_[r], grow.of[r], sum[r] + sum[r + 2]);
    return grow;
  }

  // f(i, number) for each of the thread's scores whose key has a number beside the image.
  template <class F>
  __device__ void for_far(const Flags& far, uint32_t each, F f) const {
#pragma unroll
    for (int quarter = 0; quarter < kQuarters; ++quarter) {
      if (!far.of[quarter]) continue;
#pragma unroll
      for (int i = quarter * (kKeys / 32); i < (quarter + 1) * (kKeys / 32); ++i) {
        const float2 x = load_shared2(each + 8 * t_ + 32 * i);
#pragma unroll
        for (int k = 0; k < 4; ++k) f(4 * i + k, k % 2 ? x.y : x.x);
      }
    }
  }

  // softcap · tanh(score / softcap), in log2 units: tanh z = 1 - 2 / (1 + exp 2z). The factors are
  // used up.
  __device__ void cap(float (&s)[kPart / 2], float (&factor)[2]) const {
    const float softcap = task_.problem.softcap, inverse = 2 / softcap;
#pragma unroll
    for (int i = 0; i < kPart / 2; ++i)
      s[i] = softcap * kLog2e *
             (1 - __fdividef(2, 1 + exp2_fast(s[i] * (factor[i / 2 % 2] * inverse))));
    factor[0] = factor[1] = 1;
  }

  // -inf for keys that a row does not see, whatever they are.
  __device__ void hide(const RowTile& at, int first, float (&s)[kPart / 2]) const {
    uint32_t seen[2];  // bit 2 i + k: key first + 8 i + 2 t + k
    for (int r = 0; r < 2; ++r) {
      seen[r] = keys_below(end_[r] - first) & ~keys_below(at.start - first);
      if (task_.problem.mask) seen[r] &= mask_bits(at, row_in_tile_ + 8 * r, first);
    }
#pragma unroll
    for (int i = 0; i < kPart / 2; ++i)
      if (!(seen[i / 2 % 2] >> (i / 4 * 2 + i % 2) & 1)) s[i] = -INFINITY;
  }
  // Those of the thread's keys that are among the first n of a part.
  __device__ uint32_t keys_below(int n) const {
    const auto first = [](int bits) { return bits <= 0 ? 0 : bits >= 32 ? ~0u : (1u << bits) - 1; };
    const int mine = n - 2 * t_;
    return (first((mine + 7) / 8 * 2) & 0x55555555) | (first((mine + 6) / 8 * 2) & 0xaaaaaaaa);
  }
  __device__ uint32_t mask_bits(const RowTile& at, int row, int first) const {
    const View& mask = task_.problem.mask;
    const int token = min(at.first_row + row, rows() - 1) / task_.group;
    const bool* const from = static_cast<const bool*>(mask.data) + offset_of(mask, at.b, 0, token);
    uint32_t bits = 0;
#pragma unroll 4
    for (int i = 0; i < kPart / 4; ++i) {
      const int key = first + i / 2 * 8 + 2 * t_ + i % 2;
      if (key >= at.start && key < at.length && from[key * mask.stride[3]]) bits |= 1u << i;
    }
    return bits;
  }

  static __device__ void make_weights(const float (&s)[kPart / 2],
                                      uint32_t (&weights)[kPart / 16][4]) {
#pragma unroll
    for (int i = 0; i < kPart / 16; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) weights[i][k] = half_pair(s[8 * i + 2 * k], s[8 * i + 2 * k + 1]);
  }

  // Writes this split's sums, waits for the others', and adds up those of its share of the rows.
  // Returns kNothing where there is none to store for the group, kOthers where the thread's rows
  // are not among them and its sums are 0, kOwn where they are those of all splits. `merge`: shared
  // memory, for each group states of 64 units and splits, and maxima of 16 units. `together`: both
  // groups have the same share, for their rows are the same, or neither can go on alone.
  //
  // A unit is a quad's two rows. Their sums lie in pieces of 64 bytes, as the quad wrote them. Each
  // float4 is added up by a thread, which fetches those of all splits at once, and goes where that
  // of split 0 was, for the quad to take.
  enum Share { kNothing, kOthers, kOwn };
  template <int kSums>
  __device__ Share add_splits(const RowTile& at, float (&o)[kSums], uint32_t merge, bool together) {
    constexpr int kQuarter = kSums / 4, kBatch = 8;
    constexpr int kNext = 2 * partial_words_of(D);  // from a split to the next
    const int thread = threadIdx.x % 128, splits = at.splits;
    const auto meet_all = [&] { together ? meet(3, 256) : meet(1 + group_, 128); };
    float4* const all =
        task_.partials +
        (static_cast<int64_t>(at.part) * round_.splits * 2 + group_) * partial_words_of(D);
    float4* const mine = all + at.split * kNext + thread;
#pragma unroll
    for (int i = 0; i < kQuarter; ++i)
      mine[128 * i] = {o[4 * i], o[4 * i + 1], o[4 * i + 2], o[4 * i + 3]};
    for (int r = 0; r < 2; ++r) sum_[r] = quad_sum(sum_[r]);
    mine[128 * kQuarter] = {max_[0], max_[1], sum_[0], sum_[1]};
    merge += group_ * kMergeBytes;
    const uint32_t tops = merge + 64 * 16;
    meet_all();
    if (thread == 0 && (group_ == 0 || !together)) {
      const uint32_t shares = claim_shares(at);
      store_shared(tops, shares);
      if (together) store_shared(tops + kMergeBytes, shares);
    }
    meet_all();
    uint32_t shares = __float_as_uint(load_shared2(tops).x);
    meet(1 + group_, 128);
    if (!shares) return kNothing;
    Share result = kOthers;
    for (int r = 0; r < 2; ++r) max_[r] = -1e30f, sum_[r] = 0;
#pragma unroll 1
    for (; shares; shares &= shares - 1) {
      const int share = __ffs(shares) - 1;
      const int first = 32 * share / splits, units = 32 * (share + 1) / splits - first;
      // What a split's sums of a unit are multiplied by: a thread each.
      const int unit = thread / splits, split = thread % splits;
      float4 state = {};
      if (unit < units) {
        state = __ldcg(all + split * kNext + 128 * kQuarter + 4 * (first + unit));
        store_shared4(merge + 16 * thread, {__float_as_uint(state.x), __float_as_uint(state.y)});
      }
      meet(1 + group_, 128);
      float top[2] = {-1e30f, -1e30f};
      if (unit < units)
        for (int i = 0; i < splits; ++i) {
          const float2 other = load_shared2(merge + 16 * (unit * splits + i));
          top[0] = fmaxf(top[0], other.x), top[1] = fmaxf(top[1], other.y);
        }
      meet(1 + group_, 128);
      if (unit < units) {
        const float factor[2] = {exp2_fast(state.x - top[0]), exp2_fast(state.y - top[1])};
        store_shared4(merge + 16 * thread,
                      {__float_as_uint(factor[0]), __float_as_uint(factor[1]),
                       __float_as_uint(state.z * factor[0]), __float_as_uint(state.w * factor[1])});
        if (split == 0) {
          store_shared(tops + 8 * unit, __float_as_uint(top[0]));
          store_shared(tops + 8 * unit + 4, __float_as_uint(top[1]));
        }
      }
      meet(1 + group_, 128);
#pragma unroll 1
      for (int e = thread; e < 4 * units * kQuarter; e += 128) {
        const int i = e / (4 * units), place = e % (4 * units);
        float4* const from = all + 128 * i + 4 * first + place;
        const uint32_t factors = merge + 16 * (place / 4 * splits);
        float4 sum = {};
#pragma unroll 1
        for (int s = 0; s < splits; s += kBatch) {
          float4 x[kBatch];
#pragma unroll
          for (int k = 0; k < kBatch; ++k) x[k] = __ldcg(from + min(s + k, splits - 1) * kNext);
#pragma unroll
          for (int k = 0; k < kBatch; ++k) {
            if (s + k >= splits) break;
            const float2 factor = load_shared2(factors + 16 * (s + k));
            sum.x = fmaf(x[k].x, factor.x, sum.x), sum.y = fmaf(x[k].y, factor.x, sum.y);
            sum.z = fmaf(x[k].z, factor.y, sum.z), sum.w = fmaf(x[k].w, factor.y, sum.w);
          }
        }
        *from = sum;
      }
      if (const int own = thread / 4 - first; own >= 0 && own < units) {
        result = kOwn;
        const float2 maxima = load_shared2(tops + 8 * own);
        max_[0] = maxima.x, max_[1] = maxima.y;
        if (t_ == 0)
          for (int i = 0; i < splits; ++i) {
            const float2 sum = load_shared2(merge + 16 * (own * splits + i) + 8);
            sum_[0] += sum.x, sum_[1] += sum.y;
          }
      }
      meet(1 + group_, 128);
    }
#pragma unroll
    for (int i = 0; i < kQuarter; ++i) {
      float4 x = {};
      if (result == kOwn) x = __ldcg(all + 128 * i + thread);
      o[4 * i] = x.x, o[4 * i + 1] = x.y, o[4 * i + 2] = x.z, o[4 * i + 3] = x.w;
    }
    return result;
  }

  // Adds the sums of the windows before; where there are more to come, keeps them for these, and
  // there is nothing to store yet.
  template <int kSums>
  __device__ Share carry(const RowTile& at, Share share, float (&o)[kSums]) {
    const bool before = round_.window > 0;
    if (share == kNothing || !(before || at.more)) return share;
    float4* const kept = task_.carry +
                         static_cast<int64_t>(2 * at.part + group_) * partial_words_of(D) +
                         threadIdx.x % 128;
    float4* const state = kept + 128 * (kSums / 4);
    if (before && share == kOwn) {
      const float4 x = *state;
      const float theirs[2] = {x.x, x.y}, sums[2] = {x.z, x.w};
      float own[2], other[2];
      for (int r = 0; r < 2; ++r) {
        const float top = fmaxf(max_[r], theirs[r]);
        own[r] = exp2_fast(max_[r] - top), other[r] = exp2_fast(theirs[r] - top);
        max_[r] = top, sum_[r] = fmaf(sums[r], other[r], sum_[r] * own[r]);
      }
#pragma unroll
      for (int i = 0; i < kSums; i += 4) {
        const float4 y = kept[32 * i];
        o[i] = fmaf(y.x, other[0], o[i] * own[0]);
        o[i + 1] = fmaf(y.y, other[0], o[i + 1] * own[0]);
        o[i + 2] = fmaf(y.z, other[1], o[i + 2] * own[1]);
        o[i + 3] = fmaf(y.w, other[1], o[i + 3] * own[1]);
      }
    }
    if (!at.more) return share;
    if (share == kOwn) {
#pragma unroll
      for (int i = 0; i < kSums; i += 4) kept[32 * i] = {o[i], o[i + 1], o[i + 2], o[i + 3]};
      *state = {max_[0], max_[1], sum_[0], sum_[1]};
    }
    return kNothing;
  }

  // Counts this split, and waits until all are counted. Returns the shares of the rows that are
  // this block's to add up, a bit each: its own, and if it is the last, those of blocks that have
  // given up waiting. Normally all blocks run at once and none does; but other work may hold
  // multiprocessors.
  __device__ uint32_t claim_shares(const RowTile& at) const {
    const uint32_t own = 1u << at.split, splits = at.splits;
    wait_for_previous_kernel();  // the count is zero
    unsigned long long* const count = task_.done + 2 * at.item + group_;
    __threadfence();
    unsigned long long seen = atomicAdd(count, 1);
    if (static_cast<uint32_t>(seen) == splits - 1) {
      __threadfence();
      return own | static_cast<uint32_t>(seen >> 32);
    }
    const int64_t start = clock64();
    while (static_cast<uint32_t>(load_anew(count)) < splits) {
      if (clock64() - start <= task_.patience) continue;
      seen = atomicOr(count, static_cast<unsigned long long>(own) << 32);
      if (static_cast<uint32_t>(seen) < splits) return 0;
      break;
    }
    __threadfence();
    return own;
  }

  // Where the thread's two rows go (null: nowhere), what brings sums to fp16, and the product of
  // these with the rotation to the result. Writes lse. `most`: the largest sum of a row; `sum`: its
  // weights'.
  struct Result {
    uint16_t* out[2];
    float down[2], scale[2];
  };
  __device__ Result finish(const RowTile& at, Share share, const float (&most)[2],
                           const float (&sums)[2]) const {
    const AttentionProblem& p = task_.problem;
    const float of_values = __uint_as_float(norm_exponent(p.v_norms, at) << 23) * level_;
    Result result = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // fp16 operands: a power of two brings the largest of a row to 2^8.
      const uint32_t exponent = min(max(__float_as_uint(most[r]) >> 23, 20u), 240u);
      result.down[r] = __uint_as_float((254 + 8 - exponent) << 23);
      const int row = at.first_row + row_in_tile_ + 8 * r;
      if (row >= rows() || share != kOwn) continue;
      const int token = row / task_.group, head = at.h * task_.group + row - token * task_.group;
      result.out[r] = const_cast<uint16_t*>(row_of(p.out, at, row));
      float own = 1, sum = sums[r], top = max_[r];
      if (p.sinks) {
        const float sink = load_element(p.sinks, head * p.sinks.stride[1]) * kLog2e;
        if (sink > -1e30f) {
          const float raised = fmaxf(top, sink);
          own = exp2_fast(top - raised);
          sum = sum * own + exp2_fast(sink - raised);
          top = raised;
        }
      }
      if (p.lse && t_ == 0)
        p.lse[(static_cast<int64_t>(at.b) * p.Hq + head) * p.Lq + token] =
            sum == 0 ? -INFINITY : (top + __log2f(sum)) * (1 / kLog2e);
      result.scale[r] =
          sum == 0 ? 0 : own / sum * of_values * __uint_as_float((exponent - 8) << 23);
    }
    return result;
  }

  // Writes columns `first` .. of the result, by way of the warp's rows of an image.
  template <int kColumns>
  __device__ void write_result(const Result& result, int first, const float* y,
                               uint32_t image) const {
    const bool half = task_.problem.out.dtype == Dtype::f16;
    const int row = row_in_tile_ % 64;
#pragma unroll
    for (int i = 0; i < kColumns / 4; ++i) {
      const int r = i % 2;
      const float x0 = y[2 * i] * result.scale[r], x1 = y[2 * i + 1] * result.scale[r];
      store_shared(piece_at(image, row + 8 * r, i / 2) + 4 * t_,
                   half ? half_pair(x0, x1) : bfloat_pair(x0, x1));
    }
    __syncwarp();
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int piece = t_; piece < kColumns / 8; piece += 4) {
        uint32_t x[4];
        load_words(x, piece_at(image, row + 8 * r, piece));
        if (result.out[r])
          *reinterpret_cast<uint4*>(result.out[r] + first + 8 * piece) = {x[0], x[1], x[2], x[3]};
      }
    __syncwarp();
  }

  const PrefillTask& task_;
  uint32_t shared_;
  PrefillTask::Round round_;
  float level_;                      // what 1 in an image stands for, but for its unit
  int group_, g_, t_, row_in_tile_;  // of the thread; lane / 4, % 4
  int end_[2];
  float factor_[2], max_[2], sum_[2];  // sum_: of the thread's own keys
  bool far_ = false;                   // norms come beside the latest tile
};

}  // namespace tq::cuda
