// Attention of few query rows over the packed cache, in one kernel: the tuned path.
//
// The schedule (device/schedule.cuh) gives each block a piece of the keys of one or more items (KV
// heads); here is what the block does from one piece to the next. Its warps' work on a piece is in
// decode_warps.cuh; blocks that share an item exchange their sums and rotate them in
// decode_finish.cuh.
//
// Shared memory: table 64 KB, rings 66 to 134 KB (portable: 8 to 24), the rest 6 to 20 KB.
#pragma once

#include "decode_warps.cuh"
#include "prepare.h"

namespace tq::cuda {

template <int D, int kNT, bool kPortable>
class Decoder {
  using F = Finish<D, kNT, kPortable>;
  using S = DecodeShape<D, kNT, kPortable>;
  using Warps = DecodeWarps<D, kNT, kPortable>;

 public:
  // The kernel. What its blocks do on a segment is described in one of three places of shared
  // memory. The block's first segment stays in place 0, since other blocks may have parts of its
  // item; the others take places 1 and 2 in turn.
  static __device__ void run(const DecodeTask& task) {
    const float centroid = task.problem.centroids[threadIdx.x % 16];
    typename Warps::Warp().ring.init();
    if (!(task.plan.blocks_per_item > 0 ? start_even(task) : start_on_line(task))) return;
    Table::fill<S::kWarps>(F::shared(), centroid, sqrtf(static_cast<float>(D)) * kLevelScale);
    if (threadIdx.x == S::kThreads - 1) F::describe(task);
    F::describe_places();
    __syncthreads();
    wait_for_previous_kernel();  // the rotated queries, the exchange's words (rotate_query.cu)
    begin(0, 0);
    __syncthreads();
    uint32_t turn = 0;  // units that went through this warp's ring
    int place = 0, last = 0;
#pragma unroll 1
    for (;;) {
      turn = Warps::attend(place, turn);
      const Work& w = *F::work(place);
      int to_rotate = w.whole() ? place : -1;
      const bool more = w.next != kNone && next_segment(task, place);
      if (to_rotate >= 0 || more) {
        S::Slots::reuse();  // the rings held the sums
        __syncthreads();
      }
      if (more) {
        place = last = place == 1 ? 2 : 1;
      } else {
        if (to_rotate >= 0) F::finish(place, F::kRotate, true);
        // Whoever waits too long for other blocks does the whole item alone (decode_finish.cuh).
        place = uniform(exchange(last, place));
        if (place < 0) return;
        if (threadIdx.x == 0) make_alone(F::work(place));
        to_rotate = -1;
        S::Slots::reuse();
        __syncthreads();
      }
      // The copies of a segment run during the rotation of the one before.
      Warps::copy_first_keys(*F::work(place), F::work(place)->units[0], turn);
      if (to_rotate >= 0) F::finish(to_rotate, F::kRotate, true);
      begin(place, turn);
      __syncthreads();
    }
  }

 private:
  // The first segment, by each warp for itself, so that the first copies are issued as soon as the
  // length is there. False: there is none.
  static __device__ bool start_even(const DecodeTask& task) {
    const Segment s = segment_at(task, first_even_item(task.plan));
    if (s.blocks == 0) return false;
    Warps::copy_first_keys(s, F::units_of(task.k, task.k_norms, s), 0);
    if (threadIdx.x == 0) F::describe(task, s, F::work(0));
    return true;
  }

  // The same on the line, where one warp finds out for all.
  static __device__ bool start_on_line(const DecodeTask& task) {
    plan(task, kFirst, F::work(0));
    __syncthreads();
    if (F::work(0)->blocks == 0) return false;
    Warps::copy_first_keys(*F::work(0), F::work(0)->units[0], 0);
    return true;
  }

  // Describes the segment that `next` names, by one warp.
  static __device__ void plan(const DecodeTask& task, uint32_t next, Work* w) {
    if (threadIdx.x >= 32) return;
    const Segment s = segment_at(task, next);
    if (threadIdx.x == 0) F::describe(task, s, w);
  }

  // What there is to do for a segment while its first keys are under way. The queries come before
  // other copies are issued, behind which they would wait for microseconds.
  static __device__ void begin(int place, uint32_t turn) {
    const Work& w = *F::work(place);
    const typename F::Queries queries = F::load_queries(w);
    F::describe_rows(w);
    F::keep_queries(queries);
    Warps::copy_ahead(w, turn);
  }

  // Describes the segment after the one in `place` where the next one belongs. Whether there is
  // one.
  static __device__ bool next_segment(const DecodeTask& task, int place) {
    Work* const next = F::work(place == 1 ? 2 : 1);
    plan(task, F::work(place)->next, next);
    __syncthreads();
    return next->blocks > 0;
  }

  // Brings the segments of whose items other blocks have parts, the first and the last one, to an
  // end with those blocks. Returns the place of one with whom that takes too long, or -1.
  // `described`: the place of the one whose rows are described.
  static __device__ int exchange(int last, int described) {
    if (last == 0) {
      if (F::work(0)->whole()) return -1;
      return F::finish(0, F::kReduce | F::kCollect | F::kRotate, true) ? -1 : 0;
    }
    bool in_time = true, other_in_time = true;
    int late = -1;
    // No block waits before all its sums are out, nor does anyone wait for a rotation.
#pragma unroll 1
    for (int pass = 0; pass < 4; ++pass) {
      const int place = pass % 2 == 0 ? 0 : last;
      if (F::work(place)->blocks > 1) {
        if (place != described) {
          __syncthreads();  // whoever still reads the rows
          F::describe_rows(*F::work(place));
          described = place;
          __syncthreads();
        }
        if (pass < 2) {
          in_time = F::finish(place, F::kReduce, true);
        } else if (!F::finish(place, F::kCollect | F::kRotate, in_time)) {
          late = place;
        } else {
          __syncthreads();  // whoever still reads it
          if (threadIdx.x == 0) F::work(place)->blocks = 1;
        }
      }
      const bool swap = in_time;
      in_time = other_in_time, other_in_time = swap;
    }
    return late;
  }

  // All of a segment's item for this block.
  static __device__ void make_alone(Work* w) {
    w->next = kNone;
    w->from = 0, w->to = static_cast<int>(divide_up(w->length, kUnit)) - w->first_unit;
    w->warps = min(w->to, S::kWarps);
    w->rank = 0, w->blocks = 1, w->team = F::team_of(1);
  }
};

template <int D, int kNT, bool kPortable>
__global__ void __maxnreg__((DecodeShape<D, kNT, kPortable>::kRegisters))
    decode_kernel(const __grid_constant__ DecodeTask task) {
  if constexpr (kPortable == kPortableHere) Decoder<D, kNT, kPortable>::run(task);
}

template <int D, int kNT, bool kPortable>
cudaError_t launch_decode_rows(const DecodeTask& task, cudaStream_t stream) {
  using Shape = DecodeShape<D, kNT, kPortable>;
  const cudaError_t error = prepare<decode_kernel<D, kNT, kPortable>>(Shape::kBytes);
  if (error != cudaSuccess) return error;
  const int shared_by = task.plan.blocks_per_item;
  const dim3 grid =
      shared_by > 0 ? dim3(shared_by, task.plan.blocks / shared_by) : dim3(task.plan.blocks);
  return launch(decode_kernel<D, kNT, kPortable>, grid, Shape::kThreads, Shape::kBytes, stream,
                task, !kPortable);
}

template <int D>
cudaError_t launch_decode(const DecodeTask& task, cudaStream_t stream) {
  if (task.plan.portable) return launch_decode_rows<D, 1, true>(task, stream);
  switch (task.plan.tile_rows) {
    case 8: return launch_decode_rows<D, 1, false>(task, stream);
    case 16:
      if constexpr (D <= 256) return launch_decode_rows<D, 2, false>(task, stream);
    case 32:
      if constexpr (D <= 128) return launch_decode_rows<D, 4, false>(task, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace tq::cuda
