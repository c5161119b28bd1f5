// The end of the decode kernel: the way from a block's sums to the output.
//
// Blocks that share an item exchange through global memory, in words of 16 bytes: two rows of two
// coordinates. Some of them then rotate some groups of 32 coordinates each: out = Πᵀ · result.
//   direct, where it is not much: each block publishes its sums; those that rotate read all blocks'
//     and add them up
//   in two steps: each block adds up all blocks' sums of some words and publishes what it finds;
//     those that rotate collect that. So a block reads about as much as one block's sums and one
//     result, however many blocks there are.
// Several lanes do a word, each for some of the blocks.
// No flags: a word is there when it is no longer kUnwritten. Normally all blocks run at once. Where
// other work holds multiprocessors they may not, so no block waits for longer than task.patience:
// then it does its whole item alone, and so whoever waits for it in turn.
//
// At small contexts the time is a chain of latencies, so what does not depend on each other is
// asked for at once and early: the numbers of Π, for example, before the sums are complete. And at
// large ones no spilled register may be read on the way: memory is so busy that one that has left
// the small L1 takes microseconds to come back.
#pragma once

#include "decode_block.cuh"

namespace tq::cuda {

template <int D, int kNT, bool kPortable>
struct Finish : Block<D, kNT, kPortable> {
  using S = DecodeShape<D, kNT, kPortable>;
  using Block<D, kNT, kPortable>::frame;
  using Block<D, kNT, kPortable>::partial;
  using Block<D, kNT, kPortable>::result;
  using Block<D, kNT, kPortable>::row_info;
  using Block<D, kNT, kPortable>::scratch;
  using Block<D, kNT, kPortable>::work;
  using Block<D, kNT, kPortable>::write_result;

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

  // ------------------------------------------------------------------------------------ rotation
  // outᵀ = Πᵀ · result, 16 rows x 32 coordinates at a time, in steps of 8 terms. (Four tiles of 8
  // coordinates: tile j has every fourth one from the j-th on, so that a lane's numbers of Π for
  // all four lie next to each other.) Such groups are dealt to the item's blocks, and to teams of
  // warps in a block, which share the steps. Three tf32 products of the numbers' high and low parts
  // make one of 21 bits.
  struct Rotation {
    static constexpr int kSteps = D / 8, kAtOnce = D <= 128 ? 2 : 4;
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
                low[j] = a[j] - tf32_part(a[j]);
              }
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                mma_tf32(c[m][j], low, b[j][0], b[j][1]);
                mma_tf32(c[m][j], a, b[j][0] - tf32_part(b[j][0]), b[j][1] - tf32_part(b[j][1]));
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

  // ------------------------------------------------------------------------------------- the end
  // Brings a segment that is one of several of its item to an end, or one of the two steps of it;
  // or rotates one that is whole. False: words of other blocks did not come in time (`in_time`: nor
  // did they in an earlier step). A function of its own, for all of a block's threads.
  enum Steps { kReduce = 1, kCollect = 2, kRotate = 4 };
  static __device__ __noinline__ bool finish(int place, int steps, bool in_time) {
    const Work& w = *work(place);
    // Who has nothing to rotate is done when nobody needs it.
    if (w.direct && w.rank >= S::kOutGroups) return true;
    const Rotation rotation(w, steps & kRotate);
    typename Rotation::Numbers pi;  // takes as long to come as words do, so is asked for early
    rotation.load(rotation.group, rotation.member, pi);
    if (steps & kReduce) in_time = reduce(w);
    if (!(steps & kRotate)) return in_time;
    if (w.rank >= S::kOutGroups) return true;  // nothing to rotate
    if (steps & kCollect && !(w.direct ? __syncthreads_and(in_time) : collect(w, in_time)))
      return false;
    rotation.run(w, pi);
    return true;
  }

  // Combines each number over the lanes of a team.
  template <int kNumbers, class Combine>
  static __device__ void over_team(int team, float (&x)[kNumbers], Combine combine) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2)
      if (lanes < team)
#pragma unroll
        for (int c = 0; c < kNumbers; ++c) x[c] = combine(x[c], __shfl_xor_sync(~0u, x[c], lanes));
  }

  // Adds up all blocks' sums of this block's words, and publishes the results; or of all words, for
  // itself. False: some did not come in time. Needs no other warp.
  static __device__ bool reduce(const Work& w) {
    const Thread me;
    const int blocks = w.blocks, pairs = w.pairs;
    const bool direct = w.direct;
    const int mine = direct ? w.words : (w.words - w.rank + blocks - 1) / blocks;
    // A team of lanes does a word: as many as there are threads, or blocks.
    int team = 1;
    while (team < 32 && 2 * team * mine <= S::kThreads && team < blocks) team *= 2;
    const int per_warp = 32 / team, member = me.lane & (team - 1);
    bool in_time = true;
#pragma unroll 1
    for (int base = uniform(me.warp) * per_warp; base < mine; base += S::kWarps * per_warp) {
      const int here = base + me.lane / team, word = direct ? here : here * blocks + w.rank;
      const int c = word % (D / 2), pair = word / (D / 2);
      float4 total = {}, all = {kNothing, 0, kNothing, 0};  // {max, sum, max, sum}
      constexpr int kAtOnce = 4;
#pragma unroll 1
      for (int from = member; here < mine && from < blocks; from += kAtOnce * team) {
        const float4* const sums_at = partial(w, c, from) + pair;
        const float4* const states_at = partial(w, D / 2, from) + pair;
        float4 sums[kAtOnce], states[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          sums[j] = {}, states[j] = {kNothing, 0, kNothing, 0};
          if (from + j * team < blocks) {
            states[j] = load_word(states_at + j * team * pairs);
            sums[j] = load_word(sums_at + j * team * pairs);
          }
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j)
          if (from + j * team < blocks) {
            in_time = in_time && await(states_at + j * team * pairs, &states[j]);
            in_time = in_time && await(sums_at + j * team * pairs, &sums[j]);
          }
        float most[2] = {all.x, all.z};
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j)
          most[0] = fmaxf(most[0], states[j].x), most[1] = fmaxf(most[1], states[j].z);
        scale(exp2_fast(all.x - most[0]), exp2_fast(all.z - most[1]), &total, &all);
        all.x = most[0], all.z = most[1];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          scale(exp2_fast(states[j].x - most[0]), exp2_fast(states[j].z - most[1]), &sums[j],
                &states[j]);
          total.x += sums[j].x, total.y += sums[j].y, total.z += sums[j].z, total.w += sums[j].w;
          all.y += states[j].y, all.w += states[j].w;
        }
      }
      __syncwarp();
      float most[2] = {all.x, all.z};
      over_team(team, most, [](float a, float b) { return fmaxf(a, b); });
      scale(exp2_fast(all.x - most[0]), exp2_fast(all.z - most[1]), &total, &all);
      float sum[6] = {total.x, total.y, total.z, total.w, all.y, all.w};
      over_team(team, sum, [](float a, float b) { return a + b; });
      in_time = __all_sync(~0u, in_time);
      if (here >= mine || member > 0 || !in_time) continue;
      if (direct) write_result(word, {sum[0], sum[1], sum[2], sum[3]});
      if (direct && c > 0) continue;
      const int n = 2 * pair,
                rows = c == 0 && (!direct || w.rank == 0) ? w.rows : 0;  // with an lse
      const float factor0 = row_factor(row_info()[n], {most[0], sum[4]}, n < rows);
      const float factor1 = row_factor(row_info()[n + 1], {most[1], sum[5]}, n + 1 < rows);
      if (direct)
        row_info()[n].factor = factor0, row_info()[n + 1].factor = factor1;
      else
        store_word(w.result + word,
                   {sum[0] * factor0, sum[1] * factor1, sum[2] * factor0, sum[3] * factor1});
    }
    return in_time;
  }
  // Sums of two rows, and their states {max, sum, max, sum} but for the max.
  static __device__ void scale(float row0, float row1, float4* sums, float4* state) {
    sums->x *= row0, sums->z *= row0, state->y *= row0;
    sums->y *= row1, sums->w *= row1, state->w *= row1;
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
