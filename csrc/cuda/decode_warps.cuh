// What the warps of a decode block do on a segment: their copies, their units, and the sum of all.
//
// Warps take units of 32 keys in turn, each by itself:
//
//   copies      -> K unit   Sᵀ[32 keys x rows] = K · q̂ᵀ     steps of 16 keys x 16 coordinates
//                  scores, weights P in registers, online softmax
//               -> V unit   Oᵀ[D x rows]      += Vᵀ · Pᵀ    steps of 16 coordinates x 16 keys
//
// A 4-bit coordinate becomes an fp16 level by a look-up: one byte, two coordinates, half a fragment
// register (device/table.cuh). For V two rows' nibbles are first brought together in a byte, which
// transposes them. Keys and queries are both in the rotated space, so K needs no rotation; O is
// rotated back at the end.
//
// Then the warps' sums are added in shared memory.
//
// Cost per 32 keys of D = 128, in passes of shared memory: 128 look-ups, 32 loads of bytes, 8 of
// norms; about 540 instructions a warp, 2 per coordinate, of which 128 permutations and 32
// products. With 128 multiprocessors at work that is just faster than memory delivers.
#pragma once

#include "decode_finish.cuh"

namespace tq::cuda {

template <int kWidth>
__device__ inline void load_chunk(const char* from, uint32_t* words) {
  if constexpr (kWidth == 16) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  } else if constexpr (kWidth == 8) {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    words[0] = v.x, words[1] = v.y;
  } else if constexpr (kWidth == 4) {
    words[0] = *reinterpret_cast<const uint32_t*>(from);
  } else if constexpr (kWidth == 2) {
    words[0] = *reinterpret_cast<const uint16_t*>(from);
  } else {
    words[0] = *reinterpret_cast<const uint8_t*>(from);
  }
}

// One thread's view of a segment at work.
template <int D, int kNT, bool kPortable>
class DecodeWarps {
  using F = Finish<D, kNT, kPortable>;
  using S = DecodeShape<D, kNT, kPortable>;
  using T = Tile<D>;

 public:
  // A warp's number and its ring, known to be the same in all lanes (see uniform()).
  struct Warp {
    int number;
    typename S::Slots ring;

    __device__ Warp()
        : number(uniform(Thread().warp)),
          ring(shared() + S::kRing + number * S::Slots::kBytes,
               shared() + S::kBarriers + number * S::kSlots * 8) {}
  };

  // -------------------------------------------------------------------------------- the copies
  // Unit n of this warp in a segment is unit from + warp + n · warps of the item. The ring is ahead
  // by kAhead units and empty between segments; `turn` counts the units that went through it. The
  // first keys are copied as early as can be.
  static __device__ void copy_first_keys(const Segment& s, const UnitSource& keys, uint32_t turn) {
    Warp warp;
    const int unit = uniform(s.from) + warp.number, pair = turn % S::Slots::kAhead;
    const int count = unit < uniform(s.to) ? keys_of(s, unit) : 0;
    warp.ring.template fill<0>(2 * pair, keys, unit, count);
  }
  // The rest of the first kAhead units.
  static __device__ void copy_ahead(const Work& w, uint32_t turn) {
    Warp warp;
    turn = uniform(turn);
    const int end = uniform(w.to), keys_here = uniform(keys_of(w, 0));
    int unit = uniform(w.from) + warp.number;
#pragma unroll 1
    for (int i = 0; i < S::Slots::kAhead; ++i, unit += S::kWarps) {
      const int pair = (turn + i) % S::Slots::kAhead;
      if (i > 0) fill<0>(warp.ring, w, pair, unit, end, keys_here);
      fill<1>(warp.ring, w, pair, unit, end, keys_here);
    }
  }

  // --------------------------------------------------------------------------------- attention
  // This warp's share of a segment, added to the others'. A function of its own, so that its loop
  // has the registers to itself. Returns the ring's next turn.
  static __device__ __noinline__ uint32_t attend(int place, uint32_t turn) {
    const Work& w = *F::work(place);
    DecodeWarps warp;
    warp.load_queries();
    turn = warp.add_units(w, uniform(turn));
    allow_next_kernel();
    warp.merge_warps(w);
    return turn;
  }

 private:
  static __device__ char* shared() { return F::shared(); }

  // Keys or values of a unit, unless it is none of the segment.
  template <int kValues>
  static __device__ void fill(typename S::Slots& ring, const Work& w, int pair, int unit, int end,
                              int keys) {
    ring.template fill<kValues>(2 * pair + kValues, w.units[kValues], unit,
                                unit < end ? keys - unit * kUnit : 0);
  }
  // Of a unit and what follows it.
  static __device__ int keys_of(const Segment& s, int unit) {
    return s.length - (s.first_unit + unit) * kUnit;
  }

  __device__ void load_queries() {
    const Thread me;
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt) {
#pragma unroll
      for (int j = 0; j < S::kQuerySteps; ++j) q_[j][nt] = F::query(j, nt)[me.lane];
#pragma unroll
      for (int c = 0; c < 2; ++c) factor_[nt][c] = *F::query_scale(8 * nt + 2 * me.t + c);
    }
  }

  // The units of a segment that are this warp's, into o_, max_ and sum_.
  __device__ uint32_t add_units(const Work& w, uint32_t turn) {
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
      for (int c = 0; c < 2; ++c) max_[nt][c] = kNothing, sum_[nt][c] = 0;
#pragma unroll
    for (int i = 0; i < S::kTiles; ++i)
#pragma unroll
      for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
        for (int c = 0; c < 4; ++c) o_[i][nt][c] = 0;

    const Thread me;
    const auto [key_at, even_at, odd_at] = F::places()[me.lane];
    const int norm_at = keep(T::kNorms + 2 * T::position(0, me.g));
    // From tile 0 to tile 1, from row r to row r + 8: as many positions for every r.
    constexpr int kTileStep = T::position(1, 0) - T::position(0, 0);
    constexpr int kHalfStep = T::position(0, 8) - T::position(0, 0);
    const uint32_t lane4 = keep(4 * me.lane);
    const uint32_t table = uniform(static_cast<int>(shared_address(shared())));
    auto norm = [](const char* at) {
      return __uint_as_float(static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(at)) << 16);
    };

    Warp warp;
    const int keys_here = uniform(keys_of(w, 0)), end = uniform(w.to);
    const int plain_from = uniform(w.plain_from), plain_to = uniform(w.plain_to);
#pragma unroll 1
    for (int unit = uniform(w.from) + warp.number; unit < end; unit += S::kWarps) {
      const int pair = turn % S::Slots::kAhead;
      const uint32_t round = turn / S::Slots::kAhead;
      const int next = unit + S::Slots::kAhead * S::kWarps;

      // Scores.
      float s[2][kNT][4] = {};
      const char* keys = warp.ring.wait(2 * pair, round);
#pragma unroll
      for (int chunk = 0; chunk < T::kQuarter / T::kKeyChunk; ++chunk) {
        uint32_t words[2][2][(T::kKeyChunk + 3) / 4];
#pragma unroll
        for (int tile = 0; tile < 2; ++tile)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            load_chunk<T::kKeyChunk>(keys + key_at +
                                         (tile * kTileStep + half * kHalfStep) * T::kRow +
                                         chunk * 4 * T::kKeyChunk,
                                     words[tile][half]);
#pragma unroll
        for (int byte = 0; byte < T::kKeyChunk; byte += 2)
#pragma unroll
          for (int tile = 0; tile < 2; ++tile) {
            uint32_t a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
              a[i] = Table::levels(table, words[tile][i % 2][byte / 4], byte % 4 + i / 2, lane4);
            const int step = (chunk * T::kKeyChunk + byte) / 2;
#pragma unroll
            for (int nt = 0; nt < kNT; ++nt) {
              const uint2 q = step < S::kQuerySteps ? q_[step % S::kQuerySteps][nt]
                                                    : F::query(step, nt)[me.lane];
              mma(s[tile][nt], a, q.x, q.y);
            }
          }
      }
      // Rows g and g + 8 of both tiles: scores in log2 units, up to the row's factor.
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float k_norm = norm(keys + norm_at + 2 * (tile * kTileStep + half * kHalfStep));
#pragma unroll
          for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
            for (int c = 0; c < 2; ++c) s[tile][nt][2 * half + c] *= k_norm;
        }
      fill<0>(warp.ring, w, pair, next, end, keys_here);
      const char* values = warp.ring.wait(2 * pair + 1, round);
      float v_norm[2][2];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          v_norm[tile][half] = norm(values + norm_at + 2 * (tile * kTileStep + half * kHalfStep));
      if (unit < plain_from || unit >= plain_to) {
        if (F::frame()->softcap != 0) soften(s);
        hide(s, v_norm, (w.first_unit + unit) * kUnit, w.start);
      }

      // Weights, relative to max_: raised, and done again, when they are too large.
      uint32_t weight[2][kNT][2];  // fp16, of columns 2t and 2t + 1
      float sum[kNT][2];
      if (!__all_sync(~0u, weigh(s, v_norm, weight, sum))) {
        raise_max(s, v_norm);
        weigh(s, v_norm, weight, sum);
      }
#pragma unroll
      for (int nt = 0; nt < kNT; ++nt) sum_[nt][0] += sum[nt][0], sum_[nt][1] += sum[nt][1];

      // Values. Pᵀ, the right operand of Oᵀ += Vᵀ · Pᵀ, is the transpose of what the lanes hold.
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        uint32_t pt[kNT][2];
#pragma unroll
        for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
          for (int half = 0; half < 2; ++half) pt[nt][half] = transpose8x8(weight[tile][nt][half]);
#pragma unroll
        for (int chunk = 0; chunk < T::kEighth / T::kValueChunk; ++chunk) {
          constexpr int kWords = (T::kValueChunk + 3) / 4;
          uint32_t even[2][kWords], odd[2][kWords];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const char* at = values + (tile * kTileStep + half * kHalfStep) * T::kRow +
                             chunk * 8 * T::kValueChunk;
            load_chunk<T::kValueChunk>(at + even_at, even[half]);
            load_chunk<T::kValueChunk>(at + odd_at, odd[half]);
          }
          // Bytes of one coordinate and two keys: the even key's nibble high, so that it is first.
#pragma unroll
          for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int i = 0; i < kWords; ++i) {
              const uint32_t e = even[half][i], o = odd[half][i];
              even[half][i] = select_bits(0xF0F0F0F0, e, o >> 4);  // even coordinates
              odd[half][i] = select_bits(0xF0F0F0F0, e << 4, o);   // odd coordinates
            }
#pragma unroll
          for (int byte = 0; byte < T::kValueChunk; ++byte) {
            uint32_t a[4];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
              a[2 * half] = Table::levels(table, even[half][byte / 4], byte % 4, lane4);
              a[2 * half + 1] = Table::levels(table, odd[half][byte / 4], byte % 4, lane4);
            }
#pragma unroll
            for (int nt = 0; nt < kNT; ++nt)
              mma(o_[chunk * T::kValueChunk + byte][nt], a, pt[nt][0], pt[nt][1]);
          }
        }
      }
      fill<1>(warp.ring, w, pair, next, end, keys_here);
      ++turn;
    }
    return turn;
  }

  // The weights of a unit, times the values' norms, and their sums. Whether they are small enough.
  __device__ bool weigh(const float (&s)[2][kNT][4], const float (&v_norm)[2][2],
                        uint32_t (&weight)[2][kNT][2], float (&sum)[kNT][2]) const {
    bool fits = true;
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt) {
      __half2 heaviest = as_half2(0);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float e[2];
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            e[c] = exp2_fast(fmaf(s[tile][nt][2 * half + c], factor_[nt][c], -max_[nt][c]));
            sum[nt][c] = tile + half == 0 ? e[c] : sum[nt][c] + e[c];
          }
          const __half2 both =
              __floats2half2_rn(e[0] * v_norm[tile][half], e[1] * v_norm[tile][half]);
          heaviest = __hmax2(heaviest, both);
          weight[tile][nt][half] = as_bits(both);
        }
      // Positive fp16 numbers are in the order of their bits: both halves at once against
      // kHeadroom.
      fits = fits && !(as_bits(heaviest) + kOverHeadroom & 0x80008000) &&
             fmaxf(sum[nt][0], sum[nt][1]) <= kLargestSum;
    }
    return fits;
  }

  // softcap · tanh(score / softcap), in the scores' own units (log2 over factor).
  __device__ void soften(float (&s)[2][kNT][4]) const {
    const float softcap = F::frame()->softcap, cap = softcap * kLog2e, inverse = 2 / softcap;
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float back = __fdividef(cap, factor_[nt][c % 2]);
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          // tanh z = 1 - 2 / (1 + exp 2z); the exponent is in log2 units already.
          const float e = exp2_fast(s[tile][nt][c] * factor_[nt][c % 2] * inverse);
          s[tile][nt][c] = back * (1 - __fdividef(2, 1 + e));
        }
      }
  }

  // Hides the keys that a row may not see: by the mask, the causal rule, kv_start, kv_len. The norm
  // of a key that neither of the lane's rows sees may be NaN: it becomes 0.
  __device__ void hide(float (&s)[2][kNT][4], float (&v_norm)[2][2], int position,
                       int start) const {
    const Thread me;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = position + T::position(tile, me.g + 8 * half);
        bool any = false;
#pragma unroll
        for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const RowInfo& row = F::row_info()[8 * nt + 2 * me.t + c];
            const bool seen = key >= start && key < row.end &&
                              (!row.mask || row.mask[key * F::frame()->mask.stride[3]]);
            if (!seen) s[tile][nt][2 * half + c] = -INFINITY;
            any = any || seen;
          }
        if (!any) v_norm[tile][half] = 0;
      }
  }

  // Raises max_ to what this unit's scores need, and scales what was summed under the old one.
  __device__ void raise_max(const float (&s)[2][kNT][4], const float (&v_norm)[2][2]) {
    float log_norm[2][2];
    for (int tile = 0; tile < 2; ++tile)
      for (int half = 0; half < 2; ++half)
        log_norm[tile][half] = fmaxf(__log2f(v_norm[tile][half]), kLeastNorm);
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float most = max_[nt][c];
        for (int tile = 0; tile < 2; ++tile)
          for (int half = 0; half < 2; ++half)
            most =
                fmaxf(most, fmaf(s[tile][nt][2 * half + c], factor_[nt][c], log_norm[tile][half]));
        for (int lanes = 4; lanes < 32; lanes *= 2)
          most = fmaxf(most, __shfl_xor_sync(~0u, most, lanes));
        const float scale = exp2_fast(max_[nt][c] - most);
        max_[nt][c] = most;
        sum_[nt][c] *= scale;
#pragma unroll
        for (int i = 0; i < S::kTiles; ++i) {
          o_[i][nt][c] *= scale;
          o_[i][nt][c + 2] *= scale;
        }
      }
  }

  // -------------------------------------------------------------------- from warps to the block
  // Adds up the warps' sums: they become the item's result if this block has all of it, else they
  // are published. Then the block has to meet before the rings are filled again.
  __device__ void merge_warps(const Work& w) {
    const Thread me;
    if (me.g == 0)
#pragma unroll
      for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          atomicMax(F::block_max(8 * nt + 2 * me.t + c), F::ordered(max_[nt][c]));
    __syncthreads();
    const int pairs = w.pairs, words = w.words, warps = w.warps;
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt) {
      float own[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int n = 8 * nt + 2 * me.t + c;
        own[c] = exp2_fast(max_[nt][c] - F::from_ordered(*F::block_max(n)));
        // Each lane of a column has a sum of its own, but the same max.
        float sum = sum_[nt][c];
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
        if (me.g == 0) *F::warp_sum(me.warp, n) = sum * own[c];
      }
      const int pair = 4 * nt + me.t;
      float4* const mine = F::word_of_warp(pairs, me.warp, pair * (D / 2)) + me.g;
      if (pair < pairs && me.warp < warps)
#pragma unroll
        for (int i = 0; i < S::kTiles; ++i)
          mine[i * 8] = {o_[i][nt][0] * own[0], o_[i][nt][1] * own[1], o_[i][nt][2] * own[0],
                         o_[i][nt][3] * own[1]};
    }
    __syncthreads();
    const bool whole = w.whole();
    constexpr int kShare = S::kShare;
#pragma unroll 1
    for (int base = me.warp * (32 / kShare); base < words; base += S::kThreads / kShare) {
      const int word = base + me.lane / kShare;
      float4 total = {};
#pragma unroll
      for (int i = 0; i < S::kWarps; i += kShare)
        if (const int from = i + me.lane % kShare; from < warps && word < words) {
          const float4 part = *F::word_of_warp(pairs, from, word);
          total = {total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w};
        }
#pragma unroll
      for (int lanes = 1; lanes < kShare; lanes *= 2) {
        total.x += __shfl_xor_sync(~0u, total.x, lanes);
        total.y += __shfl_xor_sync(~0u, total.y, lanes);
        total.z += __shfl_xor_sync(~0u, total.z, lanes);
        total.w += __shfl_xor_sync(~0u, total.w, lanes);
      }
      if (me.lane % kShare != 0 || word >= words) continue;
      if (whole)
        F::write_result(word, total);
      else
        store_word(F::partial(w, word % (D / 2), w.rank) + word / (D / 2), total);
    }
    if (me.warp == S::kWarps - 1) {
      // Lanes that share a row share the warps.
      constexpr int kOfRow = 32 / S::kRows;
      const int n = me.lane % S::kRows;
      State all = {F::from_ordered(*F::block_max(n)), 0};
#pragma unroll
      for (int i = 0; i < S::kWarps; i += kOfRow)
        if (const int warp = i + me.lane / S::kRows; warp < S::kWarps)
          all.sum += *F::warp_sum(warp, n);
#pragma unroll
      for (int lanes = S::kRows; lanes < 32; lanes *= 2)
        all.sum += __shfl_xor_sync(~0u, all.sum, lanes);
      if (whole && me.lane < S::kRows)
        F::row_info()[n].factor = F::row_factor(F::row_info()[n], all, n < w.rows);
      const State next = {__shfl_down_sync(~0u, all.max, 1), __shfl_down_sync(~0u, all.sum, 1)};
      if (!whole && me.lane < S::kRows && n % 2 == 0 && n / 2 < pairs)
        store_word(F::partial(w, D / 2, w.rank) + n / 2, {all.max, all.sum, next.max, next.sum});
    }
  }

  uint2 q_[S::kQuerySteps][kNT];
  float factor_[kNT][2];  // what makes a product a score in log2 units
  // Oᵀ in fragments, and the softmax's state of columns 2t and 2t + 1.
  float o_[S::kTiles][kNT][4];
  float max_[kNT][2], sum_[kNT][2];
};

}  // namespace tq::cuda
