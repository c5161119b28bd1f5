// Attention of few query rows over the packed cache, in one kernel: the tuned path.
//
// What a block does. The schedule (device/schedule.cuh) gives each block a piece of the keys of one
// or more items (KV heads). Its warps take units of 32 keys in turn, each by itself:
//
//   bulk copies -> K unit   Sᵀ[32 keys x rows] = K · q̂ᵀ     steps of 16 keys x 16 coordinates
//                  scores, weights P in registers, online softmax
//               -> V unit   Oᵀ[D x rows]      += Vᵀ · Pᵀ    steps of 16 coordinates x 16 keys
//
// A 4-bit coordinate becomes an fp16 level by a look-up: one byte, two coordinates, half a fragment
// register (device/table.cuh). For V two rows' nibbles are first brought together in a byte, which
// transposes them. Keys and queries are both in the rotated space, so K needs no rotation; O is
// rotated back at the end.
//
// Then the warps' sums are added in shared memory, and blocks that share an item exchange theirs
// (decode_finish.cuh).
//
// Shared memory: table 64 KB (holes: states and results), rings 128 KB.
// Cost per 32 keys of D = 128, in passes of shared memory: 128 look-ups, 32 loads of bytes, 8 of
// norms; about 520 instructions a warp, 2 per coordinate, of which 128 permutations and 32
// products. With 128 multiprocessors at work that is just faster than memory delivers.
#pragma once

#include "decode_finish.cuh"
#include "prepare.h"

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

// One thread's view of a running decode kernel.
template <int D, int kNT>
class Decoder {
  using F = Finish<D, kNT>;
  using S = DecodeShape<D, kNT>;
  using T = Tile<D>;

 public:
  __device__ explicit Decoder(const DecodeTask& task)
      : task_(task),
        p_(task.problem),
        warp_(uniform(threadIdx.x / 32)),
        ring_(shared() + S::kRing + warp_ * S::Slots::kBytes,
              shared() + S::kBarriers + warp_ * S::kSlots * 8) {}

  __device__ void run() {
    // Asked for before the copies, behind which it would have to queue.
    const float centroid = p_.centroids[threadIdx.x % 16];
    Segment s = segment_at(task_, ~0u);
    if (s.blocks == 0) return;
    Segment done, parts[2];  // parts: the first and the last segment, if other blocks have a share
    done.blocks = parts[0].blocks = parts[1].blocks = 0;
    bool first = true;
#pragma unroll 1
    do {
#pragma unroll 1
      for (;;) {
        if (done.blocks > 0) merge_warps(done);
        if (s.blocks > 0) start_copies(s);
        if (first) {
          Table::fill(shared(),
                      __float2half(centroid * (sqrtf(static_cast<float>(D)) * kLevelScale)));
          wait_for_previous_kernel();  // the rotated queries, the exchange's words
        }
        if (s.blocks > 0) start_more_copies(s);
        if (done.blocks == 1) F::rotate(task_, done);
        if (s.blocks == 0) break;
        attend(s);
        if (!s.whole()) parts[first ? 0 : 1] = s;
        first = false;
        done = s;
        s = segment_at(task_, s.next);
      }
      if (parts[0].blocks + parts[1].blocks == 0) return;
      done.blocks = 0;
      // No block waits before all its sums are out, nor does anyone wait for a rotation.
#pragma unroll 1
      for (int pass = 0; pass < 4; ++pass) {
        Segment& part = parts[pass % 2];
        if (part.blocks < 2) continue;
        __syncthreads();  // whoever still reads the rows of the pass before
        F::describe_rows(task_, part);
        // Whoever waited too long does the whole item alone (decode_finish.cuh).
        if (!(pass < 2 ? F::reduce(task_, part) : F::rotate(task_, part)))
          part = alone(part);
        else if (pass >= 2)
          part.blocks = 0;
      }
      Segment& next = parts[parts[0].blocks == 0];
      s = known_uniform(next);
      next.blocks = 0;
      fence_before_copies();  // the rings held what was exchanged
      __syncthreads();
    } while (s.blocks > 0);
  }

 private:
  static __device__ int lane() { return F::lane(); }
  static __device__ int g() { return F::g(); }
  static __device__ int t() { return F::t(); }
  static __device__ char* shared() { return F::shared(); }

  // All of a segment's item for this block.
  static __device__ Segment alone(Segment s) {
    s.next = ~1u;  // of nobody
    s.from = 0, s.to = static_cast<int>(divide_up(s.length, kUnit)) - s.first_unit;
    s.first_block = blockIdx.x, s.blocks = 1;
    return s;
  }

  // -------------------------------------------------------------------------------- the copies
  // Unit n of this warp in a segment is unit from + warp + n · warps of the item. The ring is ahead
  // by kAhead units and empty between segments; turn_ counts the units that went through it.
  __device__ void start_copies(const Segment& s) {
    k_ = unit_of(task_.k, s, kUnit * T::kRow), v_ = unit_of(task_.v, s, kUnit * T::kRow);
    k_norms_ = unit_of(task_.k_norms, s, kUnit * 2),
    v_norms_ = unit_of(task_.v_norms, s, kUnit * 2);
    keys_left_ = s.length - s.first_unit * kUnit;
    copy_ahead(s, 0, 1);
  }
  // Issuing copies is slow while many are under way: only the first unit's come before other work.
  __device__ void start_more_copies(const Segment& s) { copy_ahead(s, 1, S::Slots::kAhead); }
  __device__ void copy_ahead(const Segment& s, int from, int to) {
#pragma unroll 1
    for (int i = from; i < to; ++i) {
      const int unit = s.from + warp_ + i * S::kWarps;
      const int pair = (turn_ + i) % S::Slots::kAhead;
      fill_keys(pair, unit, s.to);
      fill_values(pair, unit, s.to);
    }
  }
  static __device__ const char* unit_of(const Source& source, const Segment& s, int unit_bytes) {
    return uniform(source.data +
                   16 * (static_cast<uint64_t>(source.batch_row) * static_cast<uint32_t>(s.b) +
                         static_cast<uint64_t>(source.head) * static_cast<uint32_t>(s.h)) +
                   static_cast<uint64_t>(static_cast<uint32_t>(s.first_unit)) * unit_bytes);
  }
  __device__ void fill_keys(int pair, int unit, int to) {
    if (unit >= to) return;
    ring_.template fill<typename T::Keys>(
        2 * pair, k_ + static_cast<int64_t>(unit) * (kUnit * T::kRow),
        k_norms_ + unit * (kUnit * 2), min(kUnit, keys_left_ - unit * kUnit));
  }
  __device__ void fill_values(int pair, int unit, int to) {
    if (unit >= to) return;
    ring_.template fill<typename T::Values>(
        2 * pair + 1, v_ + static_cast<int64_t>(unit) * (kUnit * T::kRow),
        v_norms_ + unit * (kUnit * 2), min(kUnit, keys_left_ - unit * kUnit));
  }

  // --------------------------------------------------------------------------------- attention
  // This warp's share of a segment, into o_, max_ and sum_.
  __device__ void attend(const Segment& segment) {
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

    // Rotated queries, the right operand of Sᵀ = K · q̂ᵀ: step j takes the coordinates of bytes 2j
    // and 2j + 1 of the lane's quarter.
    const int rows = F::rows_of(task_, segment);
    const int64_t first_row = static_cast<int64_t>(segment.item) * S::kRows;
    uint2 q[S::kTiles][kNT];
    float factor[kNT][2];
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt) {
      const int n = 8 * nt + g();
      const __half* row = task_.q + (first_row + n) * D;
#pragma unroll
      for (int j = 0; j < S::kTiles; ++j) {
        const int byte = T::key_byte(2 * j / T::kKeyChunk, t()) + 2 * j % T::kKeyChunk;
        q[j][nt] = n < rows ? *reinterpret_cast<const uint2*>(row + 2 * byte) : uint2{0, 0};
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int column = 8 * nt + 2 * t() + c;
        factor[nt][c] = column < rows ? task_.q_scale[first_row + column] : 1;
      }
    }

    // Units whose keys all rows see, and that need no softcap.
    const int unseen = p_.causal ? static_cast<int>(p_.Lq) - 1 : 0;  // by token 0
    const int seen_by_all =
        segment.length - max(unseen - segment.row_tile * S::kRows / task_.group, 0);
    const bool plain = !p_.mask && p_.softcap == 0;
    const int plain_from = segment.start % kUnit != 0;
    const int plain_to = plain ? max(seen_by_all, 0) / kUnit - segment.first_unit : 0;
    F::describe_rows(task_, segment);
    __syncthreads();  // for this and, the first time, for the table

    const int key_at = keep(T::Keys::offset(T::position(0, g())) + T::key_byte(0, t()));
    const int even_at = keep(T::Values::offset(T::position(0, 2 * t())) + T::value_byte(0, g()));
    const int odd_at = keep(T::Values::offset(T::position(0, 2 * t() + 1)) + T::value_byte(0, g()));
    const int norm_at = keep(T::kNorms + 2 * T::position(0, g()));
    // From tile 0 to tile 1, from row r to row r + 8: as many positions for every r.
    constexpr int kTileStep = T::position(1, 0) - T::position(0, 0);
    constexpr int kHalfStep = T::position(0, 8) - T::position(0, 0);
    const uint32_t lane4 = keep(4 * lane());
    auto norm = [](const char* at) {
      return __uint_as_float(static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(at)) << 16);
    };

#pragma unroll 1
    for (int unit = segment.from + warp_; unit < segment.to; unit += S::kWarps) {
      const int pair = turn_ % S::Slots::kAhead;
      const uint32_t round = turn_ / S::Slots::kAhead;
      const int next = unit + S::Slots::kAhead * S::kWarps;

      // Scores.
      float s[2][kNT][4] = {};
      const char* keys = ring_.wait(2 * pair, round);
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
              a[i] = Table::levels(shared(), words[tile][i % 2][byte / 4], byte % 4 + i / 2, lane4);
            const int step = (chunk * T::kKeyChunk + byte) / 2;
#pragma unroll
            for (int nt = 0; nt < kNT; ++nt) mma(s[tile][nt], a, q[step][nt].x, q[step][nt].y);
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
      fill_keys(pair, next, segment.to);
      const char* values = ring_.wait(2 * pair + 1, round);
      float v_norm[2][2];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          v_norm[tile][half] = norm(values + norm_at + 2 * (tile * kTileStep + half * kHalfStep));
      if (unit < plain_from || unit >= plain_to) {
        if (p_.softcap != 0) soften(s, factor);
        hide(s, v_norm, (segment.first_unit + unit) * kUnit, segment.start);
      }

      // Weights, relative to max_: raised, and done again, when they are too large.
      uint32_t weight[2][kNT][2];  // fp16, of columns 2t and 2t + 1
      float sum[kNT][2];
      if (!__all_sync(~0u, weigh(s, factor, v_norm, weight, sum))) {
        raise_max(s, factor, v_norm);
        weigh(s, factor, v_norm, weight, sum);
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
              a[2 * half] = Table::levels(shared(), even[half][byte / 4], byte % 4, lane4);
              a[2 * half + 1] = Table::levels(shared(), odd[half][byte / 4], byte % 4, lane4);
            }
#pragma unroll
            for (int nt = 0; nt < kNT; ++nt)
              mma(o_[chunk * T::kValueChunk + byte][nt], a, pt[nt][0], pt[nt][1]);
          }
        }
      }
      fill_values(pair, next, segment.to);
      ++turn_;
    }
    // Sums are each lane's own so far; max_ is the same in all lanes of a column.
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2)
          sum_[nt][c] += __shfl_xor_sync(~0u, sum_[nt][c], lanes);
  }

  // The weights of a unit, times the values' norms, and their sums. Whether they are small enough.
  __device__ bool weigh(const float (&s)[2][kNT][4], const float (&factor)[kNT][2],
                        const float (&v_norm)[2][2], uint32_t (&weight)[2][kNT][2],
                        float (&sum)[kNT][2]) const {
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
            e[c] = exp2_fast(fmaf(s[tile][nt][2 * half + c], factor[nt][c], -max_[nt][c]));
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
  __device__ void soften(float (&s)[2][kNT][4], const float (&factor)[kNT][2]) const {
    const float cap = p_.softcap * kLog2e, inverse = 2 / p_.softcap;
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float back = __fdividef(cap, factor[nt][c % 2]);
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
          // tanh z = 1 - 2 / (1 + exp 2z); the exponent is in log2 units already.
          const float e = exp2_fast(s[tile][nt][c] * factor[nt][c % 2] * inverse);
          s[tile][nt][c] = back * (1 - __fdividef(2, 1 + e));
        }
      }
  }

  // Hides the keys that a row may not see: by the mask, the causal rule, kv_start, kv_len. The norm
  // of a key that neither of the lane's rows sees may be NaN: it becomes 0.
  __device__ void hide(float (&s)[2][kNT][4], float (&v_norm)[2][2], int position,
                       int start) const {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int key = position + T::position(tile, g() + 8 * half);
        bool any = false;
#pragma unroll
        for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const RowInfo& row = F::row_info()[8 * nt + 2 * t() + c];
            const bool seen =
                key >= start && key < row.end && (!row.mask || row.mask[key * p_.mask.stride[3]]);
            if (!seen) s[tile][nt][2 * half + c] = -INFINITY;
            any = any || seen;
          }
        if (!any) v_norm[tile][half] = 0;
      }
  }

  // Raises max_ to what this unit's scores need, and scales what was summed under the old one.
  __device__ void raise_max(const float (&s)[2][kNT][4], const float (&factor)[kNT][2],
                            const float (&v_norm)[2][2]) {
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
                fmaxf(most, fmaf(s[tile][nt][2 * half + c], factor[nt][c], log_norm[tile][half]));
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
  // are published.
  __device__ void merge_warps(const Segment& segment) {
    if (g() == 0)
#pragma unroll
      for (int nt = 0; nt < kNT; ++nt)
#pragma unroll
        for (int c = 0; c < 2; ++c)
          atomicMax(F::block_max(8 * nt + 2 * t() + c), F::ordered(max_[nt][c]));
    __syncthreads();
#pragma unroll
    for (int nt = 0; nt < kNT; ++nt) {
      float own[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int n = 8 * nt + 2 * t() + c;
        own[c] = exp2_fast(max_[nt][c] - F::from_ordered(*F::block_max(n)));
        if (g() == 0) *F::warp_sum(warp_, n) = sum_[nt][c] * own[c];
      }
      float4* const mine = F::fragments() + warp_ * S::kFragments * 32 + lane();
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i)
        mine[(i * kNT + nt) * 32] = {o_[i][nt][0] * own[0], o_[i][nt][1] * own[1],
                                     o_[i][nt][2] * own[0], o_[i][nt][3] * own[1]};
    }
    __syncthreads();
    float4* const partial = F::partial_of(task_, segment, segment.rank());
    const bool whole = segment.whole();
#pragma unroll 1
    for (int f = warp_; f < S::kFragments; f += S::kWarps) {
      float4 total = {};
#pragma unroll 4
      for (int w = 0; w < S::kWarps; ++w) {
        const float4 part = F::fragments()[(w * S::kFragments + f) * 32 + lane()];
        total = {total.x + part.x, total.y + part.y, total.z + part.z, total.w + part.w};
      }
      if (whole) {
        const int n = 8 * (f % kNT) + 2 * t(), d = F::coordinate(f);
        *reinterpret_cast<float2*>(F::result(d, n)) = {total.x, total.y};
        *reinterpret_cast<float2*>(F::result(d + 1, n)) = {total.z, total.w};
      } else {
        store_word(partial + f * 32 + lane(), total);
      }
    }
    if (const int n = static_cast<int>(threadIdx.x) - (S::kThreads - 32); n >= 0 && n < S::kRows) {
      State all = {F::from_ordered(*F::block_max(n)), 0};
#pragma unroll 4
      for (int w = 0; w < S::kWarps; ++w) all.sum += *F::warp_sum(w, n);
      if (whole)
        F::row_info()[n].factor =
            F::row_factor(task_, F::row_info()[n], all, n < F::rows_of(task_, segment));
      // Two rows make a word.
      constexpr uint32_t kRowLanes = ~0u >> (32 - S::kRows);
      const State next = {__shfl_down_sync(kRowLanes, all.max, 1),
                          __shfl_down_sync(kRowLanes, all.sum, 1)};
      if (!whole && n % 2 == 0)
        store_word(partial + result_words(D, S::kRows) + n / 2,
                   {all.max, all.sum, next.max, next.sum});
    }
    fence_before_copies();  // the rings held the sums
    __syncthreads();
  }

  const DecodeTask& task_;
  const AttentionProblem& p_;
  const int warp_;
  Ring<D, S::kSlots> ring_;
  uint32_t turn_ = 0;
  // Where the item's units are, and how many keys there are from the first one on.
  const char *k_, *v_, *k_norms_, *v_norms_;
  int keys_left_;
  // Oᵀ in fragments, and the softmax's state of columns 2t and 2t + 1.
  float o_[S::kTiles][kNT][4];
  float max_[kNT][2], sum_[kNT][2];
};

template <int D, int kNT>
__global__ void __launch_bounds__(DecodeShape<D, kNT>::kThreads, 1)
    decode_kernel(const __grid_constant__ DecodeTask task) {
  if constexpr (kDecodes) Decoder<D, kNT>(task).run();
}

template <int D, int kNT>
cudaError_t launch_decode_rows(const DecodeTask& task, cudaStream_t stream) {
  using Shape = DecodeShape<D, kNT>;
  unsigned multiprocessors;
  const cudaError_t error = prepare<decode_kernel<D, kNT>>(Shape::kBytes, &multiprocessors);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute beside_previous;
  beside_previous.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  beside_previous.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(task.plan.blocks);
  config.blockDim = dim3(Shape::kThreads);
  config.dynamicSmemBytes = Shape::kBytes;
  config.stream = stream;
  config.attrs = &beside_previous;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, decode_kernel<D, kNT>, task);
}

template <int D>
cudaError_t launch_decode(const DecodeTask& task, cudaStream_t stream) {
  switch (task.plan.tile_rows) {
    case 8: return launch_decode_rows<D, 1>(task, stream);
    case 16:
      if constexpr (D <= 256) return launch_decode_rows<D, 2>(task, stream);
    case 32:
      if constexpr (D <= 128) return launch_decode_rows<D, 4>(task, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace tq::cuda
