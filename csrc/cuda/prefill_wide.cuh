// Attention of many query rows on Hopper at D = 512, where the sums of 64 rows fill the registers
// of two warpgroups.
//
// A block takes 64 rows of a KV head at a time. Each warpgroup has half of the keys for the scores,
// and half of the columns for the sums; tiles of 64 keys come in pairs:
//
//             scores                        weights                    sums
//   group 0   S[64 x 64] = q̂ · K(2i)ᵀ      to the other through       O[64 x 256] += P(2i) · V(2i)
//   group 1   S[64 x 64] = q̂ · K(2i+1)ᵀ    shared memory                + P(2i+1) · V(2i+1), its
//   half
//
// as in prefill.cuh, S of the next pair and O of this one at a time, with the softmax meanwhile.
// They meet three times a pair: for a maximum in common, when no one reads the weights' place any
// more, and when the weights are there.
//
// Each warpgroup has a ring of its own, of four places of 16 KB, for nobody else needs what it
// reads: of the images of keys two slabs (128 coordinates) at a time, of those of values 32 rows of
// its half of the columns. The rotation comes the same way: its rows are keys for the query, values
// for the output.
//
// Shared memory: q̂ 64 KB, rings 128 KB, weights 16 KB. Cost of a pair: 4K clocks of products, which
// read it for 3.3K; 256 KB from the L2, and this binds: 64 rows are few.
#pragma once

#include "prefill_rows.cuh"

namespace tq::cuda {

struct WideShape {
  static constexpr int D = 512, kKeys = prefill_keys(D), kImage = image_bytes_of(D);
  static constexpr int kThreads = 384;
  static constexpr int kPlaces = 4, kPlace = 16 * 1024;        // of a ring
  static constexpr int kSlab = kKeys * 128;                    // of an image
  static constexpr int kQuery = 2 * kPlaces * kPlace;          // [slab][64][128 bytes]
  static constexpr int kWeights = kQuery + D / 64 * 64 * 128;  // [tile of the pair][64][128 bytes]
  static constexpr int kBarriers = kWeights + 2 * 64 * 128;
  static constexpr int kRow = kBarriers + 2 * kPlaces * 16;  // [group][64] numbers of rows
  static constexpr int kNorms = kRow + 2 * 64 * 4;           // of four pairs
  static constexpr int kMerge = kNorms + 4 * 2 * norm_bytes_of(D);
  static constexpr int kBytes = kMerge + 2 * kMergeBytes;
  static_assert(kBytes <= 227 * 1024);
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

class WidePrefill : PrefillRows<512> {
  using S = WideShape;
  using Base = PrefillRows<512>;
  static constexpr int D = S::D, kColumns = D / 2;      // of a warpgroup
  static constexpr int kUnits = S::kImage / S::kPlace;  // places that an image of keys takes

 public:
  static __device__ void run(const PrefillTask& task) {
    extern __shared__ __align__(1024) char memory[];
    WidePrefill block(task, memory);
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2 * S::kPlaces; ++i) {
        barrier_init(block.full(i / S::kPlaces, i), 1);
        barrier_init(block.free(i / S::kPlaces, i), 128);  // of the group
      }
      barrier_init_fence();
    }
    block.level_ = LevelTable::unit(task.problem.centroids);
    __syncthreads();
    wait_for_previous_kernel();
    block.round_ = task.find_round();
    if (threadIdx.x < 256) {
      take_registers<232>();
      block.consume();
    } else {
      give_registers<40>();
      // A warp for each ring.
      if (threadIdx.x % 32 == 0 && threadIdx.x < 320) block.copy((threadIdx.x - 256) / 32);
    }
  }

 private:
  using Base::Base;

  // Place number n, of all that go through a group's ring.
  __device__ uint32_t place(int group, uint32_t n) const {
    return shared_ + (group * S::kPlaces + n % S::kPlaces) * S::kPlace;
  }
  __device__ uint32_t full(int group, uint32_t n) const {
    return shared_ + S::kBarriers + 16 * (group * S::kPlaces + n % S::kPlaces);
  }
  __device__ uint32_t free(int group, uint32_t n) const { return full(group, n) + 8; }
  __device__ void wait_full(uint32_t n) const { barrier_wait(full(group_, n), n / S::kPlaces & 1); }
  // Norms of a tile of pair m of all.
  __device__ uint32_t norms(uint32_t m, int tile) const {
    return shared_ + S::kNorms + (m % 4 * 2 + tile) * norm_bytes_of(D);
  }
  // Two tiles, from the end, one for each group to score. Of an odd number of tiles, the last is
  // the one before the first: hidden, with the first one's image in its place.
  struct Pair {
    int of[2];
  };
  // The pair before tile j; there is none if its first tile lies before at.begin.
  __device__ Pair pair_before(const RowTile& at, int j) const {
    const int first = last_seen(at, j - 1);
    return {{first, last_seen(at, max(first, at.begin) - 1)}};
  }

  // -------------------------------------------------------------------- those who bring images
  __device__ void copy(int group) const {
    uint32_t n = 0, m = 0;
    RowTile at;
    for (int i = 0; find_rows(i, &at); ++i) {
      for (int k = group; k < rotation_images(D); k += 2)
        copy_keys(group, &n, task_.rotation + k * S::kImage, nullptr, 0);
      // The keys of a pair, then the values of the pair before.
      Pair pair = pair_before(at, at.end), before = {{-1, -1}};
      for (bool some = false, more = pair.of[0] >= at.begin; more || some;) {
        if (more) {
          const char* const from = tile_at(at, max(pair.of[group], at.begin));
          copy_keys(group, &n, from, from + 2 * S::kImage, norms(m++, group));
        }
        if (some)
          for (int t = 0; t < 2; ++t)
            copy_values(group, &n, tile_at(at, max(before.of[t], at.begin)) + S::kImage);
        some = more, before = pair;
        if (more) pair = pair_before(at, pair.of[1]), more = pair.of[0] >= at.begin;
      }
      for (int k = 0; k < rotation_images(D); ++k)
        copy_values(group, &n, task_.rotation + k * S::kImage);
    }
  }
  // Place n is free again, and will receive so many bytes.
  __device__ void await(int group, uint32_t n, int bytes) const {
    barrier_wait(free(group, n), (n / S::kPlaces + 1) & 1);
    barrier_expect(full(group, n), bytes);
  }
  // An image's slabs, and the norms of its tile with the first.
  __device__ void copy_keys(int group, uint32_t* n, const char* image, const char* from,
                            uint32_t norms) const {
    for (int i = 0; i < kUnits; ++i, ++*n) {
      const bool with_norms = from && i == 0;
      await(group, *n, S::kPlace + (with_norms ? norm_bytes_of(D) : 0));
      if (with_norms) copy_operand(norms, from, norm_bytes_of(D), full(group, *n));
      copy_operand(place(group, *n), image + i * S::kPlace, S::kPlace, full(group, *n));
    }
  }
  // Of four slabs, half of the rows at a time.
  __device__ void copy_values(int group, uint32_t* n, const char* image) const {
    constexpr int kPart = S::kSlab / 2;
    for (int half = 0; half < 2; ++half, ++*n) {
      await(group, *n, S::kPlace);
      for (int i = 0; i < 4; ++i)
        copy_operand(place(group, *n) + i * kPart,
                     image + (4 * group + i) * S::kSlab + half * kPart, kPart, full(group, *n));
    }
  }

  // ------------------------------------------------------------------------- those who multiply
  __device__ void consume() {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    group_ = threadIdx.x / 128, g_ = lane / 4, t_ = lane % 4;
    row_in_tile_ = 16 * warp + g_;
    query_ = shared_ + S::kQuery, weights_ = shared_ + S::kWeights;
    RowTile at;
    for (int i = 0; find_rows(i, &at); ++i) {
      rotate_query(at);
      attend(at);
      Share share = kOwn;
      if (at.splits > 1) share = add_splits(at, o_, shared_ + S::kMerge, true);
      share = carry(at, share, o_);
      if (share != kNothing)
        store(at, share);
      else
        pass(2 * rotation_images(D));
    }
  }
  __device__ void release(uint32_t n) const { release_to(free(group_, n)); }
  // Places that are of no use. All warps meet, since nobody may be two rounds behind.
  __device__ void pass(int places) {
    for (int i = 0; i < places; ++i) {
      wait_full(next_);
      meet(1 + group_, 128);
      release(next_++);
    }
  }
  static __device__ void meet_other() { meet(3, 256); }

  // Writes a fragment's pair to an image of 64 rows.
  __device__ void write_pair(uint32_t image, int r, int piece, float x, float y) const {
    store_shared(piece_at(image, row_in_tile_ + 8 * r, piece) + 4 * t_, half_pair(x, y));
  }
  // Tells the other group a number of each of the thread's two rows, and learns its.
  __device__ float2 exchange_rows(float x, float y) const {
    const uint32_t place = shared_ + S::kRow + (threadIdx.x % 128 / 4) * 8;
    if (t_ == 0) {
      store_shared(place + group_ * 256, __float_as_uint(x));
      store_shared(place + group_ * 256 + 4, __float_as_uint(y));
    }
    meet_other();
    return load_shared2(place + (1 - group_) * 256);
  }

  // q̂ to shared memory, the coordinates of this group's images of the rotation.
  __device__ void rotate_query(const RowTile& at) {
    for (int r = 0; r < 2; ++r) {
      const int row = at.first_row + row_in_tile_ + 8 * r;
      end_[r] = row < rows() ? end_of(at, row) : 0;
    }
    uint32_t a[D / 16][4];
    meet_other();  // what was there has been read
    fetch_query(at, query_, t_ + 4 * group_, 8);
    meet_other();
    read_query(query_, a);
    const Lengths lengths = normalise(a, task_.problem.query.dtype);
    float scale[2];
    find_factors(at, lengths, scale);
    meet_other();  // both have read it
#pragma unroll 1
    for (int k = group_; k < rotation_images(D); k += 2) {
      float y[kKeys / 2];
      multiply([&](int i, Operand b) { Wgmma<kKeys>::template run<false>(y, a[i], b, i > 0); });
      wgmma_wait<0>(y);
      release(next_ + kUnits - 1);
      next_ += kUnits;
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          write_pair(query_ + k * S::kSlab, r, j, y[4 * j + 2 * r] * scale[r],
                     y[4 * j + 2 * r + 1] * scale[r]);
        }
    }
    fence_for_async();
    meet_other();
  }

  // Products with the image of keys in the next places, all of which but the last become free:
  // run(step, operand).
  template <class Run>
  __device__ void multiply(Run run) const {
#pragma unroll
    for (int k = 0; k < kUnits; ++k) {
      const Operand b = describe_swizzled(uniform(place(group_, next_ + k)), 1024, 0);
      wait_full(next_ + k);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 8; ++i) run(8 * k + i, b.behind(i / 4 * S::kSlab + i % 4 * 32));
      wgmma_commit();
      if (k > 0) {
        wgmma_wait<1>();
        release(next_ + k - 1);
      }
    }
  }
  // Starts S = q̂ · Kᵀ.
  __device__ void multiply_keys(float (&s)[kKeys / 2]) const {
    const Operand a = describe_swizzled(uniform(query_), 1024, 0);
    multiply([&](int i, Operand b) {
      Wgmma<kKeys>::run(s, a.behind(i / 4 * S::kSlab + i % 4 * 32), b, i > 0);
    });
  }
  // Starts O += A · V for the 32 rows of V in place n, `a`: a slab's columns that belong to them.
  __device__ void multiply_values(uint32_t n, uint32_t a_at, bool add) {
    const Operand a = describe_swizzled(uniform(a_at), 1024, 0);
    const Operand b = describe_swizzled(uniform(place(group_, n)), 1024, S::kSlab / 2);
    wait_full(n);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 2; ++i)
      Wgmma<kColumns>::template run<true>(o_, a.behind(32 * i), b.behind(i * 16 * 128),
                                          add || i > 0);
    wgmma_commit();
  }
  // Part `part` of 4 of a pair's values.
  __device__ void multiply_part(int part) {
    multiply_values(next_ + part, weights_ + part / 2 * S::kSlab + part % 2 * 64, true);
  }

  __device__ void attend(RowTile at) {
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) o_[i] = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) max_[r] = -1e30f, sum_[r] = 0;
    Pair pair = pair_before(at, at.end);
    if (pair.of[0] < at.begin) return;
    at.start = max(at.start, at.begin * kKeys);

    float s[kKeys / 2];
    multiply_keys(s);
    wgmma_wait<0>(s);
    release(next_ + kUnits - 1);
    next_ += kUnits;
    far_ = __any_sync(~0u, load_flag(at, max(pair.of[group_], at.begin)));
    soften_pair(at, pair.of[group_], s, [] {});
    write_weights(s);
#pragma unroll 1
    while ((pair = pair_before(at, pair.of[1])).of[0] >= at.begin) {
      const uint32_t flag = load_flag(at, max(pair.of[group_], at.begin));
      multiply_keys(s);
      next_ += kUnits;
      multiply_part(0);
      wgmma_wait<1>(s);
      release(next_ - 1);
      far_ = __any_sync(~0u, flag);
      multiply_part(1);
      const Growth grow = soften_pair(at, pair.of[group_], s, [&] {
        multiply_part(2);
        multiply_part(3);
        wgmma_wait<2>();
        release(next_);
        release(next_ + 1);
      });
      wgmma_wait<0>(o_);
      release(next_ + 2);
      release(next_ + 3);
      next_ += 4;
      if (__any_sync(~0u, grow.of[0] != 1 || grow.of[1] != 1)) [[unlikely]] {
#pragma unroll
        for (int k = 0; k < kColumns / 2; ++k) o_[k] *= grow.of[k / 2 % 2];
      }
      meet_other();  // both have read the weights
      write_weights(s);
    }
    for (int part = 0; part < 4; ++part) multiply_part(part);
    wgmma_wait<0>(o_);
    for (int part = 0; part < 4; ++part) release(next_++);
  }

  // The softmax of tile j, this group's of a pair, whose maximum both agree on; `meanwhile` before
  // they meet.
  template <class Meanwhile>
  __device__ Growth soften_pair(const RowTile& at, int j, float (&s)[kKeys / 2],
                                Meanwhile meanwhile) {
    return soften(at, j, norms(pair_++, group_), s, [&](float (&most)[2]) {
      meanwhile();
      const float2 other = exchange_rows(most[0], most[1]);
      most[0] = fmaxf(most[0], other.x), most[1] = fmaxf(most[1], other.y);
    });
  }
  __device__ void write_weights(const float (&s)[kKeys / 2]) const {
#pragma unroll
    for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        write_pair(weights_ + group_ * S::kSlab, r, j, s[4 * j + 2 * r], s[4 * j + 2 * r + 1]);
    fence_for_async();
    meet_other();
  }

  // out = Πᵀ · O / l.
  __device__ void store(const RowTile& at, Share share) {
    float most[2] = {}, sum[2];
#pragma unroll
    for (int i = 0; i < kColumns / 2; ++i) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], fabsf(o_[i]));
    for (int r = 0; r < 2; ++r) most[r] = quad_max(most[r]), sum[r] = quad_sum(sum_[r]);
    const float2 other_most = exchange_rows(most[0], most[1]);
    meet_other();  // read
    const float2 other_sum = exchange_rows(sum[0], sum[1]);
    most[0] = fmaxf(most[0], other_most.x), most[1] = fmaxf(most[1], other_most.y);
    sum[0] += other_sum.x, sum[1] += other_sum.y;
    const auto result = finish(at, share, most, sum);
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        write_pair(query_ + (group_ * (kColumns / 64) + j / 8) * S::kSlab, r, j % 8,
                   o_[4 * j + 2 * r] * result.down[r], o_[4 * j + 2 * r + 1] * result.down[r]);
    fence_for_async();
    meet_other();
#pragma unroll 1
    for (int k = 0; k < 2 * rotation_images(D); ++k) {
      multiply_values(next_, query_ + k / 2 * S::kSlab + k % 2 * 64, k > 0);
      wgmma_wait<0>(o_);
      release(next_++);
    }
#pragma unroll
    for (int i = 0; i < kColumns; i += 64)
      write_result<64>(result, group_ * kColumns + i, o_ + i / 2, weights_ + group_ * S::kSlab);
  }

  uint32_t query_, weights_;
  uint32_t next_ = 0, pair_ = 0;  // place of the ring; pair
  float o_[kColumns / 2];
};

#endif

}  // namespace tq::cuda
