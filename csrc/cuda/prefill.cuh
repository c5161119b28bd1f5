// Attention of many query rows on Hopper, over images of fp16 keys and values (prefill.h).
//
// A block takes 128 rows of a KV head at a time, those that see the most keys first. Two warpgroups
// have 64 rows each; others bring the images of tiles of 128 keys (64 above D = 128), two tiles
// ahead: two warpgroups make them (fused), those of keys and those of values, or a thread copies
// them.
//
//   query    -> q̂ = Π · q, fp16, to shared memory       images of the rotation as keys
//   K image  -> S[64 x keys] = q̂ · Kᵀ                    of the next tile, while
//   V image  -> O[64 x D] += P · V                       of this one is under way;
//               softmax of the next tile meanwhile
//   output   <- Πᵀ · O / l                               images of the rotation as values
//
// All images go through one ring. Images hold norms in units of the head's (prefill_images.cuh),
// which go with the row's factor and with 1 / l; q̂ has length 2^8, undone in the factor, too. Where
// norms of a quarter tile differ too much, they come beside it: those of keys are multiplied with
// the scores; logarithms of the values' are added to them, so that the maximum bounds weights and
// values together, and the sum of weights takes them out again.
//
// Shared memory, D = 128: q̂ 32 KB, four images 128 KB; fused: the table of levels 32 KB, what the
// next images are made of 16 KB.
#pragma once

#include "prefill_rows.cuh"

namespace tq::cuda {

template <int D, bool kFused>
struct PrefillShape {
  // Registers: 128 x 512 or 168 x 384, of those who multiply and of the others. At D = 256 the
  // former need more than 512 threads would leave, and one warpgroup makes all images.
  static constexpr bool kTwoMake = kFused && D <= 192;
  static constexpr int kThreads = kTwoMake ? 512 : 384;
  // On an image: of the thread that copies it, or of all threads that make images: half of them for
  // keys, and with the norms of values the other half; values' makers count twice on their own.
  static constexpr int kArrivals = !kFused ? 1 : kThreads - 256;
  static constexpr int kGiven = kTwoMake ? (D <= 64 ? 72 : D == 128 ? 48 : 64) : kFused ? 56 : 40;
  static constexpr int kUsed = kTwoMake ? 256 - kGiven : kFused ? 224 : 232;
  static constexpr int kKeys = prefill_keys(D), kImage = image_bytes_of(D);
  static constexpr int kImages = kFused && D > 192 ? 3 : 4;  // places of the ring, from 0 on
  static constexpr int kQueryBytes =
      slabs_of(D) * 64 * 128;  // a warpgroup's: [slab][64][128 bytes]
  static constexpr int kQuery = kImages * kImage;
  static constexpr int kTable = kQuery + 2 * kQueryBytes;
  static constexpr int kStages = kTable + (kFused ? LevelTable::kBytes : 0);
  static constexpr int kStage = ImageMaker<D, false>::kStageBytes;
  static constexpr int kBarriers = kStages + (kFused ? 2 * kStage : 0);
  // Norms of four tiles. Those of tile m are written when the keys of m - 3 (or later) have been
  // used, and their products come after the softmax of m - 4.
  static constexpr int kNorms = kBarriers + 2 * 8 * kImages;
  static constexpr int kMerge = kNorms + 4 * norm_bytes_of(D);
  static constexpr int kBytes = kMerge + 2 * kMergeBytes;
  static_assert(kBytes <= 227 * 1024);
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <int D, bool kFused>
class Prefill : PrefillRows<D> {
  using S = PrefillShape<D, kFused>;
  using Base = PrefillRows<D>;
  using Base::add_splits, Base::end_of, Base::find_factors, Base::find_rows, Base::finish;
  using Base::end_, Base::factor_, Base::g_, Base::group_, Base::level_, Base::max_;
  using Base::far_, Base::fetch_query, Base::load_flag, Base::read_query, Base::piece_at,
      Base::write_result, Base::make_weights, Base::row_of, Base::rows;
  using Base::last_seen, Base::release_to;
  using Base::round_, Base::row_in_tile_, Base::shared_, Base::sum_, Base::t_, Base::task_;
  using typename Base::Flags;
  using typename Base::Growth;
  using typename Base::Share;
  static constexpr int kSteps = D / 16, kKeys = S::kKeys;

 public:
  static __device__ void run(const PrefillTask& task) {
    extern __shared__ __align__(1024) char memory[];
    Prefill block(task, memory);
    if (threadIdx.x == 0) {
      for (int i = 0; i < S::kImages; ++i) {
        barrier_init(block.full(i), S::kArrivals);  // of those who bring it
        barrier_init(block.free(i), 256);           // of the warpgroups that use it
      }
      barrier_init_fence();
    }
    block.level_ = kFused ? LevelTable::fill(memory + S::kTable, task.problem.centroids)
                          : LevelTable::unit(task.problem.centroids);
    __syncthreads();
    // What came before the kernels of this call is done, since the first of them has waited for it.
    // Of these, only the rotation's images are needed, and a count (claim_shares); or more.
    if (!kFused || task.sights) wait_for_previous_kernel();
    block.round_ = kFused ? task.fused_round() : task.find_round();
    if (threadIdx.x < 256) {
      take_registers<S::kUsed>();
      block.consume();
    } else {
      give_registers<S::kGiven>();
      if constexpr (!kFused) {
        if (threadIdx.x == 256) block.copy_images();
      } else if constexpr (!S::kTwoMake) {
        block.template make_images<true, true>();
      } else if (threadIdx.x < 384) {
        block.template make_images<true, false>();
      } else {
        block.template make_images<false, true>();
      }
    }
  }

 private:
  using Base::Base;

  // Image n of all that the block works with, its place and its barriers.
  __device__ uint32_t image(uint32_t n) const { return shared_ + n % S::kImages * S::kImage; }
  __device__ uint32_t full(uint32_t n) const {
    return shared_ + S::kBarriers + 16 * (n % S::kImages);
  }
  __device__ uint32_t free(uint32_t n) const { return full(n) + 8; }
  // The products read what other warps have stored. The fence between is here, not with those: it
  // would wait for what they fetch.
  __device__ void wait_full(uint32_t n) const {
    barrier_wait(full(n), n / S::kImages & 1);
    if (kFused) fence_for_async();
  }
  __device__ void wait_free(uint32_t n) const { barrier_wait(free(n), (n / S::kImages + 1) & 1); }
  // Norms of tile m of all.
  __device__ uint32_t norms(uint32_t m) const {
    return shared_ + S::kNorms + m % 4 * norm_bytes_of(D);
  }

  // -------------------------------------------------------------------- those who bring images
  template <bool kOfKeys, bool kOfValues>
  __device__ void make_images() const {
    const uint32_t table = shared_ + S::kTable, stage = shared_ + S::kStages;
    ImageMaker<D, false> keys(task_.problem, table, stage);
    ImageMaker<D, true> values(task_.problem, table, stage + S::kStage);
    uint32_t n = 0, m = 0;
    RowTile at;
    for (int i = 0; find_rows(i, &at); ++i) {
      int j = last_seen(at, at.end - 1);
      if (j >= at.begin) {
        if (kOfKeys) keys.start(at), keys.fetch(j);
        if (kOfValues) values.start(at), values.fetch(j);
      }
      copy_rotation(n);
      n += rotation_images(D);
      for (; j >= at.begin; ++m, n += 2) {
        j = last_seen(at, j - 1);
        const int next = max(j, at.begin);
        if (kOfValues) values.take_norms(norms(m) + key_norm_bytes_of(D));
        if (kOfKeys) {
          keys.take_norms(norms(m));
          wait_free(n);
          keys.template make<kOfValues ? 1 : 0>(image(n), next);
        } else if (n >= S::kImages) {
          // What was there before is complete, else this would be taken for a part of it.
          barrier_wait(full(n), (n / S::kImages + 1) & 1);
        }
        barrier_arrive(full(n));  // with the keys' image come the norms of both
        if (kOfValues) {
          wait_free(n + 1);
          values.template make<kOfKeys ? 1 : 0>(image(n + 1), next);
          barrier_arrive(full(n + 1), S::kArrivals / 128);
        }
      }
      copies_wait<0>();
      copy_rotation(n);
      n += rotation_images(D);
    }
  }

  __device__ void copy_images() const {
    uint32_t n = 0, m = 0;
    RowTile at;
    for (int i = 0; find_rows(i, &at); ++i) {
      copy_rotation(n);
      n += rotation_images(D);
      for (int j = last_seen(at, at.end - 1); j >= at.begin;
           j = last_seen(at, j - 1), ++m, n += 2) {
        const char* const tile = Base::tile_at(at, j);
        wait_free(n);
        barrier_expect(full(n), S::kImage + norm_bytes_of(D));
        copy_operand(norms(m), tile + 2 * S::kImage, norm_bytes_of(D), full(n));
        copy_operand(image(n), tile, S::kImage, full(n));
        wait_free(n + 1);
        barrier_expect(full(n + 1), S::kImage);
        copy_operand(image(n + 1), tile + S::kImage, S::kImage, full(n + 1));
      }
      copy_rotation(n);
      n += rotation_images(D);
    }
  }

  // The rotation's images, from the n-th of all on. All who make images arrive on them, though one
  // thread copies: a wait knows but the parity of a round, so nobody may wait for what can be over
  // without him.
  __device__ void copy_rotation(uint32_t n) const {
    for (int i = 0; i < rotation_images(D); ++i, ++n) {
      wait_free(n);
      if (kFused) __syncwarp();  // else this is one thread
      if (threadIdx.x == 256) {
        wait_for_previous_kernel();
        barrier_expect(full(n), S::kImage);
        copy_operand(image(n), task_.rotation + i * S::kImage, S::kImage, full(n));
      } else {
        barrier_arrive(full(n));
      }
    }
  }

  // ------------------------------------------------------------------------- those who multiply
  __device__ void consume() {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    group_ = threadIdx.x / 128, g_ = lane / 4, t_ = lane % 4;
    row_in_tile_ = 64 * group_ + 16 * warp + g_;
    query_ = shared_ + S::kQuery + group_ * S::kQueryBytes;
    RowTile at;
    for (int i = 0; find_rows(i, &at); ++i) {
      if (at.first_row + 64 * group_ >= rows()) {
        pass(rotation_images(D));
        for (int j = last_seen(at, at.end - 1); j >= at.begin; j = last_seen(at, j - 1), ++tile_)
          pass(2);
        pass(rotation_images(D));
        continue;
      }
      rotate_query(at);
      attend(at);
      Share share = Share::kOwn;
      if (at.splits > 1) share = add_splits(at, o_, shared_ + S::kMerge, false);
      if constexpr (!kFused) share = Base::carry(at, share, o_);
      if (share != Share::kNothing)
        store(at, share);
      else
        pass(rotation_images(D));
    }
  }

  // Images that the other warpgroup may need. All warps meet, since nobody may be two rounds
  // behind.
  __device__ void pass(int images) {
    for (int i = 0; i < images; ++i) {
      wait_full(image_);
      meet(1 + group_, 128);
      release(image_++);
    }
  }
  __device__ void release(uint32_t n) const { release_to(free(n)); }

  // q̂ of this warpgroup's rows to shared memory, and what makes products with it scores.
  __device__ void rotate_query(const RowTile& at) {
    for (int r = 0; r < 2; ++r) {
      const int row = at.first_row + row_in_tile_ + 8 * r;
      end_[r] = row < rows() ? end_of(at, row) : 0;
    }
    uint32_t a[kSteps][4];
    fetch_query(at, query_, t_, 4);
    __syncwarp();
    read_query(query_, a);
    __syncwarp();
    const Lengths lengths = normalise(a, task_.problem.query.dtype);
    float scale[2];
    find_factors(at, lengths, scale);
    constexpr int kColumns = D < kKeys ? D : kKeys;
    float y[kColumns / 2];
#pragma unroll 1
    for (int turn = 0; turn < rotation_images(D); ++turn) {
      wait_full(image_);
      const Operand b = describe_swizzled(uniform(image(image_)), 1024, 0);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kSteps; ++i)
        Wgmma<kColumns>::template run<false>(y, a[i], b.behind(step_of_keys(i)), i > 0);
      wgmma_commit();
      wgmma_wait<0>(y);
      release(image_++);
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint32_t pair =
              half_pair(y[4 * j + 2 * r] * scale[r], y[4 * j + 2 * r + 1] * scale[r]);
          const int row = row_in_tile_ % 64 + 8 * r, piece = turn * (kKeys / 8) + j;
          store_shared(piece_at(query_, row, piece) + 4 * t_, pair);
        }
    }
    fence_for_async();
    meet(1 + group_, 128);
  }

  __device__ void attend(const RowTile& at) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o_[i] = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) max_[r] = -1e30f, sum_[r] = 0;
    int j = last_seen(at, at.end - 1);
    if (j < at.begin) return;

    // Images: keys of a tile, its values, keys of the next, ...
    float s[kKeys / 2];
    uint32_t weights[kKeys / 16][4];
    multiply_keys(s, image_);
    wgmma_wait<0>(s);
    release(image_);
    far_ = kFused ? look_for_far(norms(tile_)) : __any_sync(~0u, load_flag(at, j));
    soften(at, j, s);
    make_weights(s, weights);
#pragma unroll 1
    while ((j = last_seen(at, j - 1)) >= at.begin) {
      // Whether norms come beside is found out while the tensor cores have enough to do.
      bool far;
      uint32_t flag;
      if (!kFused) flag = load_flag(at, j);
      multiply_keys(s, image_ + 2);
      if (kFused) far = look_for_far(norms(tile_));
      multiply_values(weights, image_ + 1);
      wgmma_wait<1>(s);
      release(image_ + 2);
      far_ = kFused ? far : __any_sync(~0u, flag);
      image_ += 2;
      const Growth grow = soften(at, j, s);
      wgmma_wait<0>(o_);
      release(image_ - 1);
      if (__any_sync(~0u, grow.of[0] != 1 || grow.of[1] != 1)) [[unlikely]] {
#pragma unroll
        for (int i = 0; i < D / 2; ++i) o_[i] *= grow.of[i / 2 % 2];
      }
      make_weights(s, weights);
    }
    multiply_values(weights, image_ + 1);
    wgmma_wait<0>(o_);
    release(image_ + 1);
    image_ += 2;
  }

  // Whether norms come beside a tile, of keys or values. Only one thread of a warpgroup reads a
  // place that will be written again, for it arrives on barriers for the others (release_to).
  __device__ bool look_for_far(uint32_t norms) const {
    bool any = false;
    if (threadIdx.x % 128 == 0)
      any = Flags(norms).any() || Flags(norms + key_norm_bytes_of(D)).any();
    return meet_any(1 + group_, 128, any);
  }
  __device__ Growth soften(const RowTile& at, int j, float (&s)[kKeys / 2]) {
    return Base::soften(at, j, norms(tile_++), s, [](float (&)[2]) {});
  }

  // Where 16 terms of an image's keys, or 16 of its values, lie: for a descriptor.
  static __device__ int step_of_keys(int i) { return i / 4 * (kKeys * 128) + i % 4 * 32; }
  static __device__ int step_of_values(int i) { return i * 16 * 128; }

  // Starts S = q̂ · Kᵀ.
  __device__ void multiply_keys(float (&s)[kKeys / 2], uint32_t n) const {
    const Operand a = describe_swizzled(uniform(query_), 1024, 0);
    const Operand b = describe_swizzled(uniform(image(n)), 1024, 0);
    wait_full(n);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      Wgmma<kKeys>::run(s, a.behind(i / 4 * (64 * 128) + i % 4 * 32), b.behind(step_of_keys(i)),
                        i > 0);
    wgmma_commit();
  }
  // Starts O += P · V.
  __device__ void multiply_values(const uint32_t (&weights)[kKeys / 16][4], uint32_t n) {
    const Operand b = describe_swizzled(uniform(image(n)), 1024, kKeys * 128);
    wait_full(n);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i) add_values(weights[i], b.behind(step_of_values(i)), 1);
    wgmma_commit();
  }

  // 16 of its terms. At D = 256 in two products of 128 columns: one of 256 is no faster.
  __device__ void add_values(const uint32_t (&a)[4], Operand b, int add) {
    constexpr int kColumns = D > 192 ? 128 : D;
#pragma unroll
    for (int i = 0; i < D; i += kColumns)
      Wgmma<kColumns>::template run<true>(reinterpret_cast<float (&)[kColumns / 2]>(o_[i / 2]), a,
                                          b.behind(i / 64 * (kKeys * 128)), add);
  }

  // out = Πᵀ · O / l.
  __device__ void store(const RowTile& at, Share share) {
    float most[2] = {}, sum[2];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], fabsf(o_[i]));
    for (int r = 0; r < 2; ++r) most[r] = quad_max(most[r]), sum[r] = quad_sum(sum_[r]);
    const auto result = finish(at, share, most, sum);
    uint32_t a[kSteps][4];
    Base::make_operand(o_, result.down, a);
#pragma unroll
    for (int turn = 0; turn < rotation_images(D); ++turn) {
      wait_full(image_);
      const Operand b = describe_swizzled(uniform(image(image_)), 1024, kKeys * 128);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < kKeys / 16; ++i)
        if (const int step = turn * (kKeys / 16) + i; step < kSteps)
          add_values(a[step], b.behind(step_of_values(i)), step > 0);
      wgmma_commit();
      wgmma_wait<0>(o_);
      release(image_++);
    }
    write_result<D>(result, 0, o_, query_);
  }

  uint32_t query_;
  uint32_t image_ = 0, tile_ = 0;  // the next of all
  float o_[D / 2];
};

#endif

template <int D, bool kFused>
__global__ void __launch_bounds__(PrefillShape<D, kFused>::kThreads, 1)
    prefill_kernel(const __grid_constant__ PrefillTask task) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  Prefill<D, kFused>::run(task);
#endif
}

template <int D, bool kFused>
cudaError_t launch_prefill_kernel(const PrefillTask& task, cudaStream_t stream) {
  using S = PrefillShape<D, kFused>;
  unsigned blocks = 0;
  const cudaError_t error = prepare<prefill_kernel<D, kFused>>(S::kBytes, &blocks);
  if (error != cudaSuccess) return error;
  return launch(prefill_kernel<D, kFused>, blocks, S::kThreads, S::kBytes, stream, task, true);
}

template <int D>
cudaError_t launch_prefill_dim(const PrefillTask& task, cudaStream_t stream) {
  return task.tiles ? launch_prefill_kernel<D, false>(task, stream)
                    : launch_prefill_kernel<D, true>(task, stream);
}

}  // namespace tq::cuda
