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

#include "prefill_images.cuh"

namespace tq::cuda {

template <int D, bool kFused>
struct PrefillShape {
  // Registers: 128 x 512 or 168 x 384. At D = 256 those who multiply need more than 512 threads
  // would leave, and one warpgroup makes all images.
  static constexpr bool kTwoMake = kFused && D <= 192;
  static constexpr int kThreads = kTwoMake ? 512 : 384;
  // On an image: of a thread that copies it, once from each warp that makes it (twice where others
  // make the next), once from all warps that make images if it is one of the rotation's.
  static constexpr int kArrivals = !kFused ? 1 : kTwoMake ? 8 : 4;
  static constexpr int kUsed = kTwoMake ? 208 : kFused ? 224 : 232;
  static constexpr int kGiven = kTwoMake ? 48 : kFused ? 56 : 40;
  static constexpr int kKeys = prefill_keys(D), kImage = image_bytes_of(D);
  static constexpr int kImages = kFused && D > 192 ? 3 : 4;  // places of the ring, from 0 on
  static constexpr int kQueryBytes =
      slabs_of(D) * 64 * 128;  // a warpgroup's: [slab][64][128 bytes]
  static constexpr int kQuery = kImages * kImage;
  static constexpr int kTable = kQuery + 2 * kQueryBytes;
  static constexpr int kStages = kTable + (kFused ? LevelTable::kBytes : 0);
  static constexpr int kStage = ImageMaker<D, false>::kStageBytes;
  static constexpr int kBarriers = kStages + (kFused ? 2 * kStage : 0);
  // Norms of four tiles. One place is used again when there is one for the image four images later,
  // at least, and by then it has been read.
  static constexpr int kNorms = kBarriers + 2 * 8 * kImages;
  static constexpr int kBytes = kNorms + 4 * norm_bytes_of(D);
  static_assert(kBytes <= 227 * 1024);
};

// One tile of rows, and the tiles of keys that it sees, as all warps of a block find it.
struct RowTile : KeyRange {
  int slot, item, split;      // of the round's KV heads; of all row tiles; of the tile's keys
  int first_row, begin, end;  // of the KV head's; tiles of keys
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL

template <int D, bool kFused>
class Prefill {
  using S = PrefillShape<D, kFused>;
  static constexpr int kSteps = D / 16, kKeys = S::kKeys;

 public:
  static __device__ void run(const PrefillTask& task) {
    extern __shared__ __align__(1024) char memory[];
    Prefill block(task, memory);
    if (threadIdx.x == 0) {
      for (int i = 0; i < S::kImages; ++i) {
        barrier_init(block.full(i), S::kArrivals);  // of those who bring it
        barrier_init(block.free(i), 2);             // of the warpgroups that use it
      }
      barrier_init_fence();
    }
    block.level_ = kFused ? LevelTable::fill(memory + S::kTable, task.problem.centroids)
                          : LevelTable::unit(task.problem.centroids);
    __syncthreads();
    wait_for_previous_kernel();
    block.round_ = task.find_round();
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
  __device__ Prefill(const PrefillTask& task, char* memory)
      : task_(task), shared_(shared_address(memory)) {}

  // Image n of all that the block works with, its place and its barriers.
  __device__ uint32_t image(uint32_t n) const { return shared_ + n % S::kImages * S::kImage; }
  __device__ uint32_t full(uint32_t n) const {
    return shared_ + S::kBarriers + 16 * (n % S::kImages);
  }
  __device__ uint32_t free(uint32_t n) const { return full(n) + 8; }
  __device__ void wait_full(uint32_t n) const { barrier_wait(full(n), n / S::kImages & 1); }
  __device__ void wait_free(uint32_t n) const { barrier_wait(free(n), (n / S::kImages + 1) & 1); }
  // Norms of tile m of all.
  __device__ uint32_t norms(uint32_t m) const {
    return shared_ + S::kNorms + m % 4 * norm_bytes_of(D);
  }

  // The n-th tile of rows of this block; false: there is none.
  __device__ bool find_rows(int n, RowTile* at) const {
    const AttentionProblem& p = task_.problem;
    // Back and forth, for each tile has fewer keys than the one before.
    int i = n * gridDim.x + (n % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    if (i >= round_.heads * task_.row_tiles * task_.splits) return false;
    at->split = i % task_.splits, i /= task_.splits;
    at->slot = i % round_.heads;
    const int head = round_.first + at->slot, heads = static_cast<int>(p.Hkv);
    static_cast<KeyRange&>(*at) = KeyRange(p, head / heads, head % heads);
    const int row_tile = task_.row_tiles - 1 - i / round_.heads;
    at->item = head * task_.row_tiles + row_tile;
    at->first_row = row_tile * kPrefillRows;
    const int end = end_of(*at, min(at->first_row + kPrefillRows, rows()) - 1);
    at->begin = at->start / kKeys;
    at->end = at->start < end ? (end + kKeys - 1) / kKeys : at->begin;
    if (task_.splits > 1) {
      const int each = max((at->end - at->begin + task_.splits - 1) / task_.splits, kLeastSplit);
      at->begin = min(at->begin + at->split * each, at->end);
      at->end = min(at->begin + each, at->end);
    }
    return true;
  }
  // Of a KV head.
  __device__ int rows() const { return task_.group * static_cast<int>(task_.problem.Lq); }
  // A row sees keys below this one.
  __device__ int end_of(const RowTile& at, int row) const {
    const AttentionProblem& p = task_.problem;
    if (!p.causal) return at.length;
    return max(at.length - static_cast<int>(p.Lq) + row / task_.group + 1, 0);
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
      if (at.begin < at.end) {
        if (kOfKeys) keys.start(at), keys.fetch(at.end - 1);
        if (kOfValues) values.start(at), values.fetch(at.end - 1);
      }
      copy_rotation(n);
      n += rotation_images(D);
      for (int j = at.end - 1; j >= at.begin; --j, ++m, n += 2) {
        const int next = max(j - 1, at.begin);
        if (kOfKeys) make_image(keys, n, m, next);
        if (kOfValues) make_image(values, n + 1, m, next);
      }
      copies_wait<0>();
      copy_rotation(n);
      n += rotation_images(D);
    }
  }
  template <class Maker>
  __device__ void make_image(Maker& maker, uint32_t n, uint32_t m, int next) const {
    wait_free(n);
    maker.template make<S::kTwoMake ? 0 : 1>(image(n), norms(m));
    fence_before_copies();
    __syncwarp();
    if (threadIdx.x % 32 == 0) barrier_arrive(full(n), S::kArrivals / 4);
    maker.fetch(next);
  }

  __device__ void copy_images() const {
    uint32_t n = 0, m = 0;
    RowTile at;
    for (int i = 0; find_rows(i, &at); ++i) {
      copy_rotation(n);
      n += rotation_images(D);
      for (int j = at.end - 1; j >= at.begin; --j, ++m, n += 2) {
        const char* const tile =
            task_.tiles + (static_cast<int64_t>(at.slot) * round_.tiles + j) * tile_bytes_of(D);
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
        barrier_expect(full(n), S::kImage);
        copy_operand(image(n), task_.rotation + i * S::kImage, S::kImage, full(n));
      } else if (threadIdx.x % 32 == 0) {
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
        pass(2 * (rotation_images(D) + at.end - at.begin));
        tile_ += at.end - at.begin;
        continue;
      }
      rotate_query(at);
      attend(at);
      if (task_.splits == 1 || add_splits(at))
        store(at);
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
  __device__ void release(uint32_t n) const {
    if (threadIdx.x % 128 == 0) barrier_arrive(free(n));
  }

  __device__ const uint16_t* row_of(const View& v, const RowTile& at, int row) const {
    const int token = row / task_.group, head = at.h * task_.group + row - token * task_.group;
    return static_cast<const uint16_t*>(v.data) + offset_of(v, at.b, head, token);
  }

  // q̂ of this warpgroup's rows to shared memory, and what makes products with it scores.
  __device__ void rotate_query(const RowTile& at) {
    const AttentionProblem& p = task_.problem;
    uint32_t a[kSteps][4];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = at.first_row + row_in_tile_ + 8 * r;
      end_[r] = row < rows() ? end_of(at, row) : 0;
      const uint16_t* const from = row_of(p.query, at, min(row, rows() - 1)) + 2 * t_;
#pragma unroll
      for (int i = 0; i < 2 * kSteps; ++i)
        a[i / 2][i % 2 * 2 + r] = __ldg(reinterpret_cast<const uint32_t*>(from + 8 * i));
    }
    // A negative scale's sign goes to q̂, so that larger scores are larger products.
    const Lengths lengths = normalise(a, p.query.dtype);
    const float unit = p.scale < 0 ? -0x1p8f : 0x1p8f;
    const float of_keys = __uint_as_float(norm_exponent(p.k_norms, at) << 23) * level_;
    float scale[2];
    for (int r = 0; r < 2; ++r) {
      const float factor = lengths.norm[r] * (p.scale * kLog2e / unit) * of_keys;
      // Positive, so that scores keep their order. A query with NaN has it in q̂, not here, where it
      // would reach hidden keys.
      const bool finite = fabsf(factor) < INFINITY;
      factor_[r] = finite ? fmaxf(factor, 1e-37f) : 1;
      scale[r] = finite ? lengths.inverse[r] * unit : NAN;
    }
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
          store_shared(
              query_ + piece / 8 * (64 * 128) + row * 128 + ((piece ^ row) & 7) * 16 + 4 * t_,
              pair);
        }
    }
    fence_before_copies();
    meet(1 + group_, 128);
  }

  __device__ void attend(const RowTile& at) {
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o_[i] = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) max_[r] = -1e30f, sum_[r] = 0;
    if (at.begin == at.end) return;

    // Images: keys of a tile, its values, keys of the next, ...
    float s[kKeys / 2];
    uint32_t weights[kKeys / 16][4];
    multiply_keys(s, image_);
    Flags far = load_flags();
    wgmma_wait<0>(s);
    release(image_);
    soften(at, at.end - 1, far, s);
    make_weights(s, weights);
#pragma unroll 1
    for (int j = at.end - 2; j >= at.begin; --j) {
      multiply_keys(s, image_ + 2);
      multiply_values(weights, image_ + 1);
      far = load_flags();
      wgmma_wait<1>(s);
      release(image_ + 2);
      image_ += 2;
      const Growth grow = soften(at, j, far, s);
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

  // What the sums so far are to be multiplied by.
  struct Growth {
    float of[2];
  };

  // Of the quarters of tile tile_, whose keys' image is full: whether norms come beside.
  struct Flags {
    uint32_t keys[4], values[4];
  };
  __device__ Flags load_flags() const {
    Flags far;
    load_words(far.keys, norms(tile_));
    load_words(far.values, norms(tile_) + 16);
    return far;
  }

  // Scores of tile j, the tile_-th of all, to weights (times values' norms, where they come
  // beside), relative to the maximum.
  __device__ Growth soften(const RowTile& at, int j, const Flags& far, float (&s)[kKeys / 2]) {
    const AttentionProblem& p = task_.problem;
    const uint32_t each = norms(tile_++) + 32;
    const bool far_any = far.values[0] | far.values[1] | far.values[2] | far.values[3];
    float factor[2] = {factor_[0], factor_[1]};
    if (far.keys[0] | far.keys[1] | far.keys[2] | far.keys[3]) [[unlikely]]
      for_far(far.keys, each, [&](int i, float norm) { s[i] *= norm; });
    if (p.softcap != 0) [[unlikely]]
      cap(s, factor);
    if (far_any) [[unlikely]] {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) s[i] *= factor[i / 2 % 2];
      factor[0] = factor[1] = 1;
      for_far(far.values, each + 4 * kKeys, [&](int i, float log) { s[i] += log; });
    }
    const int first = j * kKeys;
    const bool plain = !p.mask && first >= at.start && first + kKeys <= min(end_[0], end_[1]);
    if (!__all_sync(~0u, plain)) [[unlikely]]
      hide(at, first, s);

    float most[2] = {-INFINITY, -INFINITY}, sum[2] = {};
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], s[i]);
    Growth grow;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
      most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2));
      const float top = fmaxf(max_[r], most[r] * factor[r]);
      grow.of[r] = exp2_fast(max_[r] - top);
      max_[r] = top;
    }
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i)
      s[i] = exp2_fast(fmaf(s[i], factor[i / 2 % 2], -max_[i / 2 % 2]));
    if (!far_any) [[likely]] {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) sum[i / 2 % 2] += s[i];
    } else {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) sum[i / 2 % 2] += far.values[i / (kKeys / 8)] ? 0 : s[i];
      for_far(far.values, each + 8 * kKeys,
              [&](int i, float inverse) { sum[i / 2 % 2] = fmaf(s[i], inverse, sum[i / 2 % 2]); });
    }
    for (int r = 0; r < 2; ++r) sum_[r] = fmaf(sum_[r], grow.of[r], sum[r]);
    return grow;
  }

  // f(i, number) for each of the thread's scores whose key has a number beside the image.
  template <class F>
  __device__ void for_far(const uint32_t (&far)[4], uint32_t each, F f) const {
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      if (!far[quarter]) continue;
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
  __device__ void cap(float (&s)[kKeys / 2], float (&factor)[2]) const {
    const float softcap = task_.problem.softcap, inverse = 2 / softcap;
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i)
      s[i] = softcap * kLog2e *
             (1 - __fdividef(2, 1 + exp2_fast(s[i] * (factor[i / 2 % 2] * inverse))));
    factor[0] = factor[1] = 1;
  }

  // -inf for keys that a row does not see, whatever they are.
  __device__ void hide(const RowTile& at, int first, float (&s)[kKeys / 2]) const {
    uint32_t seen[2];  // bit 2 i + k: key 8 i + 2 t + k of the tile
    for (int r = 0; r < 2; ++r) {
      seen[r] = keys_below(end_[r] - first) & ~keys_below(at.start - first);
      if (task_.problem.mask) seen[r] &= mask_bits(at, row_in_tile_ + 8 * r, first);
    }
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i)
      if (!(seen[i / 2 % 2] >> (i / 4 * 2 + i % 2) & 1)) s[i] = -INFINITY;
  }
  // Those of the thread's keys that are among the first n of a tile.
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
    for (int i = 0; i < kKeys / 4; ++i) {
      const int key = first + i / 2 * 8 + 2 * t_ + i % 2;
      if (key < at.length && from[key * mask.stride[3]]) bits |= 1u << i;
    }
    return bits;
  }

  static __device__ void make_weights(const float (&s)[kKeys / 2],
                                      uint32_t (&weights)[kKeys / 16][4]) {
#pragma unroll
    for (int i = 0; i < kKeys / 16; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k) weights[i][k] = half_pair(s[8 * i + 2 * k], s[8 * i + 2 * k + 1]);
  }

  // Writes this split's sums; true: the others' had been there, and now they are added.
  __device__ bool add_splits(const RowTile& at) {
    constexpr int kWords = partial_words_of(D);
    const int thread = threadIdx.x % 128;
    float4* const all =
        task_.partials + (static_cast<int64_t>(at.item) * task_.splits * 2 + group_) * kWords;
    const auto place_of = [&](int split) { return all + split * 2 * kWords + thread; };
    float4* const mine = place_of(at.split);
#pragma unroll
    for (int i = 0; i < D / 8; ++i)
      mine[128 * i] = {o_[4 * i], o_[4 * i + 1], o_[4 * i + 2], o_[4 * i + 3]};
    mine[128 * (D / 8)] = {max_[0], max_[1], sum_[0], sum_[1]};
    __threadfence();
    meet(1 + group_, 128);
    // How many were there, from one thread to all, where q̂ is no longer needed.
    if (thread == 0) store_shared(query_, atomicAdd(task_.done + 2 * at.item + group_, 1));
    meet(1 + group_, 128);
    const auto others_done = __float_as_int(load_shared2(query_).x);
    meet(1 + group_, 128);
    if (others_done < task_.splits - 1) return false;
    __threadfence();
    // All in their order, so that the result does not depend on who came last.
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o_[i] = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) max_[r] = -1e30f, sum_[r] = 0;
#pragma unroll 1
    for (int split = 0; split < task_.splits; ++split) {
      const float4* const from = place_of(split);
      const float4 state = __ldcg(from + 128 * (D / 8));
      const float others[2] = {state.x, state.y}, sums[2] = {state.z, state.w};
      float ours[2], theirs[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float most = fmaxf(max_[r], others[r]);
        ours[r] = exp2_fast(max_[r] - most), theirs[r] = exp2_fast(others[r] - most);
        max_[r] = most;
        sum_[r] = sum_[r] * ours[r] + sums[r] * theirs[r];
      }
#pragma unroll
      for (int i = 0; i < D / 8; ++i) {
        const float4 x = __ldcg(from + 128 * i);
        o_[4 * i] = o_[4 * i] * ours[0] + x.x * theirs[0];
        o_[4 * i + 1] = o_[4 * i + 1] * ours[0] + x.y * theirs[0];
        o_[4 * i + 2] = o_[4 * i + 2] * ours[1] + x.z * theirs[1];
        o_[4 * i + 3] = o_[4 * i + 3] * ours[1] + x.w * theirs[1];
      }
    }
    return true;
  }

  // out = Πᵀ · O / l.
  __device__ void store(const RowTile& at) {
    const AttentionProblem& p = task_.problem;
    const float of_values = __uint_as_float(norm_exponent(p.v_norms, at) << 23) * level_;
    uint16_t* out[2];
    float most[2] = {}, scale[2];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], fabsf(o_[i]));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = at.first_row + row_in_tile_ + 8 * r;
      float sum = quad_sum(sum_[r]), top = max_[r];
      most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 1));
      most[r] = fmaxf(most[r], __shfl_xor_sync(~0u, most[r], 2));
      out[r] = nullptr;
      scale[r] = 0;
      if (row >= rows()) continue;
      const int token = row / task_.group, head = at.h * task_.group + row - token * task_.group;
      out[r] = const_cast<uint16_t*>(row_of(p.out, at, row));
      float own = 1;
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
      scale[r] = sum == 0 ? 0 : own / sum * of_values;
    }
    // fp16 operands: a power of two brings the largest of a row to 2^8.
    float down[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t exponent = min(max(__float_as_uint(most[r]) >> 23, 20u), 240u);
      down[r] = __uint_as_float((254 + 8 - exponent) << 23);
      scale[r] *= __uint_as_float((exponent - 8) << 23);
    }
    uint32_t a[kSteps][4];
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
      for (int k = 0; k < 4; ++k)
        a[i][k] = half_pair(o_[8 * i + 2 * k] * down[k % 2], o_[8 * i + 2 * k + 1] * down[k % 2]);
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
    const bool half = p.out.dtype == Dtype::f16;
#pragma unroll
    for (int i = 0; i < D / 4; ++i) {
      const int r = i % 2;
      const float x0 = o_[2 * i] * scale[r], x1 = o_[2 * i + 1] * scale[r];
      const uint32_t pair = half ? half_pair(x0, x1) : bfloat_pair(x0, x1);
      if (out[r]) *reinterpret_cast<uint32_t*>(out[r] + i / 2 * 8 + 2 * t_) = pair;
    }
  }

  const PrefillTask& task_;
  uint32_t shared_, query_;
  uint32_t image_ = 0, tile_ = 0;  // the next of all
  PrefillTask::Round round_;
  float level_;  // what 1 in an image stands for, but for its unit
  int group_, g_, t_, row_in_tile_;
  int end_[2];
  float factor_[2], max_[2], sum_[2];  // sum_: of the thread's own keys
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
