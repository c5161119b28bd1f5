// Attention of many query rows on every architecture from sm_80 on, over images of fp16 keys and
// values in the workspace (prefill.h).
//
// A block of eight warps takes 128 rows of a KV head at a time, those that see the most keys first;
// a warp has 16 of them, with the query and all sums in registers. Keys and values come half a tile
// at a time, two stages deep: while one is multiplied, the next is copied.
//
//   query    -> q̂ = Π · q, fp16, registers             images of the rotation as keys
//   K        -> S[16 x keys] = q̂ · Kᵀ                  softmax
//   V        -> O[16 x D] += P · V                      P as the softmax leaves it
//   output   <- Πᵀ · O / l                              images of the rotation as values
//
// A product leaves its columns where the next one wants its terms, so q̂, P and O need no way
// through shared memory. What the numbers mean is as in prefill.cuh.
//
// D = 512: the block has 64 rows, and two warps share 16: one of the first four, and one of the
// others. Each has half of the coordinates, of q̂ and of O. They add up their parts of the scores,
// and show each other O for the last product, through shared memory; keys come a quarter of a tile
// at a time.
//
// Shared memory: two stages of 16 KB (D = 64) to 32 KB, and norms. Cost of 128 rows x 128 keys at
// D = 128: 512 KB read from it, 4K clocks, for products that take an A100 4K, and others 8K or
// more; 68 KB from the L2.
#pragma once

#include "prefill_rows.cuh"

namespace tq::cuda {

// What a block works on, in shared memory, since sums need the registers.
struct alignas(16) PortableFrame {
  PrefillTask::Round round;
  float level;
  int next;   // tile of rows
  bool some;  // there is one: `at`
  RowTile at;
};

template <int D>
struct PortableShape {
  static constexpr int kWarps = 8, kThreads = 32 * kWarps;
  static constexpr int kBlocks = portable_prefill_blocks(D);
  static constexpr int kShare = D <= 256 ? 1 : 2;  // warps with the same rows
  static constexpr int kOwn = D / kShare;          // coordinates of a warp
  static_assert(16 * kWarps / kShare == prefill_rows(D));
  // A tile of keys in parts: part i of all tiles' has the keys from i · kPart on.
  static constexpr int kKeys = prefill_keys(D), kParts = 2 * kShare, kPart = kKeys / kParts;
  static constexpr int kTurns = (D + kPart - 1) / kPart;  // parts of the rotation
  // Two stages from 0 on, each a part of the keys' image and one of the values':
  // [slab][kPart][128 bytes]. Then norms of both.
  static constexpr int kSlab = kPart * 128, kPartBytes = slabs_of(D) * kSlab;
  static constexpr int kStage = 2 * kPartBytes;
  static constexpr int kNorms = 2 * kStage;
  static constexpr int kFrame = kNorms + 2 * norm_bytes_of(D);
  static constexpr int kMerge = kFrame + static_cast<int>(sizeof(PortableFrame));
  static constexpr int kExchange = kMerge + 2 * kMergeBytes;
  // Of a warp that shares rows: its part of the scores, behind it its largest sums.
  static constexpr int kMost = 16 * kPart * 4, kExchanged = kMost + 32 * 16;
  static constexpr int kBytes = kExchange + (kShare > 1 ? kWarps * kExchanged : 0);
  static_assert(kBlocks * (kBytes + 1024) <= kPortableLimit + 1024);
  // The queries, as images of 64 rows, lie at the end of the stages before there are any keys.
  static constexpr int kQueryImage = slabs_of(D) * 64 * 128;
  static constexpr int kQuery = 2 * kStage - prefill_rows(D) / 64 * kQueryImage;
  static_assert(kQuery >= 0);
  // The result goes through the stage that is free in the end, so many columns at a time.
  static constexpr int kColumns = D <= 128 ? D : 64, kResultImage = slabs_of(kColumns) * 64 * 128;
  static_assert(2 * kResultImage <= kStage && kOwn % kColumns == 0);
};

template <int D>
class PortablePrefill : PrefillRows<D, PortableShape<D>::kParts> {
  using S = PortableShape<D>;
  using Base = PrefillRows<D, S::kParts>;
  using Base::add_splits, Base::carry, Base::end_of, Base::find_factors, Base::find_rows,
      Base::finish;
  using Base::end_, Base::far_, Base::g_, Base::group_, Base::level_, Base::max_, Base::round_;
  using Base::fetch_query, Base::last_seen, Base::make_weights, Base::read_query, Base::rows;
  using Base::row_in_tile_, Base::shared_, Base::soften, Base::sum_, Base::t_, Base::task_;
  using typename Base::Flags;
  using typename Base::Share;
  static constexpr int kPart = S::kPart, kSlab = S::kSlab, kSteps = S::kOwn / 16;
  static constexpr int kScores = kPart / 2;

 public:
  static __device__ void run(const PrefillTask& task) {
    PortablePrefill block(task, memory());
    PortableFrame& f = frame();
    const float level = LevelTable::unit(task.problem.centroids);
    wait_for_previous_kernel();
    if (threadIdx.x == 0) f.round = task.find_round(), f.level = level, f.next = 0;
    for (;;) {
      copies_wait<0>();  // who had no use for the rotation left some under way
      __syncthreads();   // nobody works on the one before
      block.find_place();
      if (threadIdx.x == 0) f.some = block.find_rows(f.next++, &f.at);
      __syncthreads();
      if (!f.some) break;
      block.attend_tile(f.at);
    }
  }

 private:
  using Base::Base;

  static __device__ char* memory() {
    extern __shared__ __align__(1024) char memory[];
    return memory;
  }
  static __device__ PortableFrame& frame() {
    return *reinterpret_cast<PortableFrame*>(memory() + S::kFrame);
  }

  // What follows from the thread's number, or is in the frame, is found anew for each phase.
  __device__ void find_place() {
    const Thread me;
    group_ = me.warp / 4, g_ = me.g, t_ = me.t;
    row_in_tile_ = me.warp % (S::kWarps / S::kShare) * 16 + me.g;
    round_ = frame().round, level_ = frame().level;
  }
  // Which of the warps that share rows, and coordinates.
  static __device__ int side() { return S::kShare == 1 ? 0 : Thread().warp / 4; }
  // Where a lane's row of four matrices lies in an image: pieces 0 and 1 of rows, in the order that
  // products want.
  static __device__ int place_of_keys() {
    const Thread me;
    return place(me.lane / 16 * 8 + me.lane % 8, me.lane / 8 % 2);
  }
  static __device__ int place_of_values() {
    const Thread me;
    return place(me.lane % 16, me.lane / 16);
  }
  static __device__ int place(int row, int piece) {
    return side() * (kSteps / 4) * kSlab + row * 128 + (piece ^ row % 8) * 16;
  }
  // The lane's place in a warp's part of the exchange.
  __device__ uint32_t exchange(int warp) const {
    return shared_ + S::kExchange + warp * S::kExchanged + Thread().lane * 16;
  }
  // The warps that share rows, or the one.
  static __device__ void meet_other() {
    if constexpr (S::kShare > 1)
      meet(4 + Thread().warp % 4, 64);
    else
      __syncwarp();
  }

  // ------------------------------------------------------------------------------------- copies
  // The next stage, once all warps are done with the one before; starts the one after with
  // copy(number).
  template <class Copy>
  __device__ uint32_t next_stage(Copy copy) {
    copies_wait<0>();
    __syncthreads();
    const uint32_t here = stage(stage_);
    stage_ ^= 1;
    copy(stage_);
    copies_commit();
    return here;
  }
  __device__ uint32_t stage(int number) const { return shared_ + number * S::kStage; }
  __device__ uint32_t norms(int number) const {
    return shared_ + S::kNorms + number * norm_bytes_of(D);
  }

  // Part n of the rotation, as they are needed: warps that share rows take turns, a part of the
  // coordinates of one, one of the other.
  __device__ void copy_rotation(int number, int n) const {
    if (n >= S::kTurns) return;
    const int part = n % S::kShare * (S::kTurns / S::kShare) + n / S::kShare;
    const char* const image = task_.rotation + part / S::kParts * image_bytes_of(D);
    copy_part(stage(number), image, part % S::kParts);
  }
  // Part `part` of all tiles'; or if there is none, the rotation's first, for the result.
  __device__ void copy_tile(int number, const RowTile& at, int part) const {
    if (part < S::kParts * at.begin) return copy_rotation(number, 0);
    const char* const from = Base::tile_at(at, part / S::kParts);
    copy_part(stage(number), from, part % S::kParts);
    copy_part(stage(number) + S::kPartBytes, from + image_bytes_of(D), part % S::kParts);
    const int byte = Thread().x * 16;
    if (byte < norm_bytes_of(D))
      copy16_async(norms(number) + byte, from + 2 * image_bytes_of(D) + byte, 16);
  }
  // Part `part` of an image, of all slabs.
  static __device__ void copy_part(uint32_t to, const char* image, int part) {
    const char* const from = image + part * kSlab;
    const int mine = 16 * Thread().x;
    static_assert(S::kPartBytes % (16 * S::kThreads) == 0);
#pragma unroll
    for (int first = 0; first < S::kPartBytes; first += 16 * S::kThreads) {
      const int byte = first + mine, slab = byte / kSlab;
      const int row = byte / 128, column = 64 * slab + ((byte / 16 ^ row) & 7) * 8;
      if (column < D) copy16_async(to + byte, from + byte + slab * (S::kKeys * 128 - kSlab), 16);
    }
  }
  // The part that comes after part `part`: they go from the last to the first, without tiles that
  // nobody sees.
  __device__ int part_after(const RowTile& at, int part) const {
    if (part % S::kParts > 0) return part - 1;
    return S::kParts * (last_seen(at, part / S::kParts - 1) + 1) - 1;
  }

  // ----------------------------------------------------------------------------------- products
  // s = a · Kᵀ over the warp's coordinates.
  template <int kSize>  // of which the first are used
  __device__ void multiply_keys(float (&s)[kScores], const uint32_t (&a)[kSize][4],
                                uint32_t image) const {
    image += place_of_keys();
#pragma unroll
    for (int i = 0; i < kScores; ++i) s[i] = 0;
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
#pragma unroll
      for (int j = 0; j < kPart / 16; ++j) {
        uint32_t b[4];
        load_matrices(b, (image ^ i % 4 * 32) + i / 4 * kSlab + j * (16 * 128));
        mma(four(s, 8 * j), a[i], b[0], b[1]);
        mma(four(s, 8 * j + 4), a[i], b[2], b[3]);
      }
  }
  // O += a · V for the terms of `step`, 16 of a part's.
  __device__ void add_values(const uint32_t (&a)[4], uint32_t image, int step) {
    image += place_of_values() + step * (16 * 128);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      uint32_t b[4];
      load_transposed(b, (image ^ i % 4 * 32) + i / 4 * kSlab);
      mma(four(o_, 8 * i), a, b[0], b[1]);
      mma(four(o_, 8 * i + 4), a, b[2], b[3]);
    }
  }
  template <int kSize>
  static __device__ float (&four(float (&x)[kSize], int i))[4] {
    return reinterpret_cast<float (&)[4]>(x[i]);
  }

  // Adds the other warp's part of the scores to this one's. All threads have met since the last
  // time.
  __device__ void add_other(float (&s)[kScores]) const {
    const int warp = Thread().warp;
    const uint32_t mine = exchange(warp), other = exchange(warp ^ 4);
#pragma unroll
    for (int i = 0; i < kScores; i += 4)
      store_shared4(mine + i * 128, reinterpret_cast<const uint32_t (&)[4]>(s[i]));
    meet_other();
#pragma unroll
    for (int i = 0; i < kScores; i += 4) {
      uint32_t x[4];
      load_words(x, other + i * 128);
#pragma unroll
      for (int k = 0; k < 4; ++k) s[i + k] += __uint_as_float(x[k]);
    }
  }

  // --------------------------------------------------------------------------------- the phases
  __device__ void attend_tile(const RowTile& at) {
    const int part = part_after(at, S::kParts * at.end);  // the first
    stage_ = 0;
    rotate_query(at, part);
    attend(at, part);
    Share share = Share::kOwn;
    find_place();
    // Both groups go on together, or neither.
    if (at.splits > 1) share = add_splits(at, o_, shared_ + S::kMerge, true);
    share = carry(at, share, o_);
    if (share != Share::kNothing) store(at, share);
  }

  // q̂ of this warp's rows and coordinates, and what makes products with it scores.
  __device__ void rotate_query(const RowTile& at, int part) {
    constexpr bool kRoom = S::kQuery >= S::kStage;  // for the first stage beside the queries
    if constexpr (kRoom) copy_rotation(0, 0), copies_commit();
    find_place();
    for (int r = 0; r < 2; ++r) {
      const int row = at.first_row + row_in_tile_ + 8 * r;
      end_[r] = row < rows() ? end_of(at, row) : 0;
    }
    uint32_t a[D / 16][4];
    const uint32_t image = shared_ + S::kQuery + row_in_tile_ / 64 * S::kQueryImage;
    fetch_query(at, image, t_ + 4 * side(), 4 * S::kShare);
    meet_other();
    read_query(image, a);
    if constexpr (!kRoom) {
      __syncthreads();
      copy_rotation(0, 0);
      copies_commit();
    }
    const Lengths lengths = normalise(a, task_.problem.query.dtype);
    float scale[2];
    find_factors(at, lengths, scale);
    if (side() > 0)  // the warp's own coordinates first
#pragma unroll
      for (int i = 0; i < kSteps; ++i)
#pragma unroll
        for (int k = 0; k < 4; ++k) a[i][k] = a[D / 16 - kSteps + i][k];
#pragma unroll
    for (int turn = 0; turn < S::kTurns / S::kShare; ++turn)
#pragma unroll 1
      for (int owner = 0; owner < S::kShare; ++owner) {
        const int next = turn * S::kShare + owner + 1;
        float y[kScores];
        multiply_keys(y, a, next_stage([&](int number) {
                        if (next < S::kTurns)
                          copy_rotation(number, next);
                        else
                          copy_tile(number, at, part);
                      }));
        if constexpr (S::kShare > 1) {
          add_other(y);
          if (owner != side()) continue;
        }
#pragma unroll
        for (int i = 0; i < kScores / 2; ++i) {
          const int r = i % 2, step = turn * (kPart / 16) + i / 4;
          if (step < kSteps)
            query_[step][i % 4] = half_pair(y[2 * i] * scale[r], y[2 * i + 1] * scale[r]);
        }
      }
  }

  __device__ void attend(const RowTile& at, int part) {
#pragma unroll
    for (int i = 0; i < S::kOwn / 2; ++i) o_[i] = 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) max_[r] = -1e30f, sum_[r] = 0;
#pragma unroll 1
    for (int next; part >= S::kParts * at.begin; part = next) {
      next = part_after(at, part);
      const uint32_t image = next_stage([&](int number) { copy_tile(number, at, next); });
      if (part * kPart >= __reduce_max_sync(~0u, max(end_[0], end_[1]))) continue;  // not seen
      float s[kScores];
      uint32_t weights[kPart / 16][4];
      multiply_keys(s, query_, image);
      if constexpr (S::kShare > 1) add_other(s);
      find_place();
      const uint32_t norms = this->norms(stage_ ^ 1);
      far_ = Flags(norms, part).any() || Flags(norms + key_norm_bytes_of(D), part).any();
      const auto grow = soften(at, part, norms, s, [](float (&)[2]) {});
      if (__any_sync(~0u, grow.of[0] != 1 || grow.of[1] != 1)) [[unlikely]] {
#pragma unroll
        for (int i = 0; i < S::kOwn / 2; ++i) o_[i] *= grow.of[i / 2 % 2];
      }
      make_weights(s, weights);
#pragma unroll
      for (int i = 0; i < kPart / 16; ++i) add_values(weights[i], image + S::kPartBytes, i);
    }
  }

  // out = Πᵀ · O / l.
  __device__ void store(const RowTile& at, Share share) {
    float most[2] = {}, sums[2];
#pragma unroll
    for (int i = 0; i < S::kOwn / 2; ++i) most[i / 2 % 2] = fmaxf(most[i / 2 % 2], fabsf(o_[i]));
#pragma unroll
    for (int r = 0; r < 2; ++r) most[r] = quad_max(most[r]), sums[r] = quad_sum(sum_[r]);
    if constexpr (S::kShare > 1) {
      const int warp = Thread().warp;
      store_shared4(exchange(warp) + S::kMost,
                    {__float_as_uint(most[0]), __float_as_uint(most[1])});
      meet_other();
      const float2 theirs = load_shared2(exchange(warp ^ 4) + S::kMost);
      most[0] = fmaxf(most[0], theirs.x), most[1] = fmaxf(most[1], theirs.y);
    }
    const auto result = finish(at, share, most, sums);
    uint32_t a[kSteps][4];
    Base::make_operand(o_, result.down, a);
#pragma unroll
    for (int i = 0; i < S::kOwn / 2; ++i) o_[i] = 0;
#pragma unroll
    for (int turn = 0; turn < S::kTurns / S::kShare; ++turn)
#pragma unroll 1
      for (int owner = 0; owner < S::kShare; ++owner) {
        const auto copy = [&](int number) { copy_rotation(number, turn * S::kShare + owner + 1); };
        if constexpr (S::kShare == 1) {
          const uint32_t image = next_stage(copy);
#pragma unroll
          for (int i = 0; i < kPart / 16; ++i)
            if (const int step = turn * (kPart / 16) + i; step < kSteps)
              add_values(a[step], image, i);
        } else {
          // A turn is a step, of one of the two warps.
          static_assert(kPart == 16);
          const uint32_t place = exchange(Thread().warp % 4 + 4 * owner);
          if (owner == side()) store_shared4(place, a[turn]);
          const uint32_t image = next_stage(copy);
          uint32_t step[4];
          load_words(step, place);
          add_values(step, image, 0);
        }
      }
    find_place();
    const uint32_t image = stage(stage_) + group_ * S::kResultImage;
#pragma unroll
    for (int i = 0; i < S::kOwn; i += S::kColumns)
      Base::template write_result<S::kColumns>(result, (S::kShare > 1 ? group_ * S::kOwn : 0) + i,
                                               o_ + i / 2, image);
  }

  int stage_;                  // the one on its way
  uint32_t query_[kSteps][4];  // q̂
  float o_[S::kOwn / 2];
};

template <int D>
__global__ void __launch_bounds__(PortableShape<D>::kThreads, PortableShape<D>::kBlocks)
    portable_prefill(const __grid_constant__ PrefillTask task) {
  if constexpr (!kHopperHere) PortablePrefill<D>::run(task);
}

template <int D>
cudaError_t launch_portable_prefill(const PrefillTask& task, cudaStream_t stream) {
  using S = PortableShape<D>;
  const cudaError_t error = prepare<portable_prefill<D>>(S::kBytes);
  if (error != cudaSuccess) return error;
  return launch(portable_prefill<D>, task.blocks, S::kThreads, S::kBytes, stream, task, false);
}

}  // namespace tq::cuda
