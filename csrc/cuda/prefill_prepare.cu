// What the prefill kernels need once a call: the rotation in fp16 as images of shared memory
// (prefill.h), 16 bytes a thread; their counters at zero; and what a mask shows, tile by tile, so
// that most tiles need not look at it, and those that nobody sees are left out.
#include "prefill.h"

namespace tq::cuda {
namespace {

constexpr int kThreads = 128;

template <int D>
__global__ void __launch_bounds__(kThreads)
    prepare_prefill(const __grid_constant__ PrefillTask task) {
  constexpr int kKeys = prefill_keys(D), kImage = image_bytes_of(D);
  wait_for_previous_kernel();
  allow_next_kernel();
  const int thread = blockIdx.x * kThreads + threadIdx.x, threads = gridDim.x * kThreads;
  if (task.splits > 1)
    for (int i = thread; i < 2 * task.windows * task.row_tiles * task.heads(); i += threads)
      task.done[i] = 0;
  const int image = thread / (kImage / 16), slab = thread / (kKeys * 8) % slabs_of(D);
  const int row = thread / 8 % kKeys, column = 64 * slab + 8 * ((thread ^ row) & 7);
  const int i = image * kKeys + row;
  uint4 piece = {};
  if (i < D && column < D) {
    const float4* from = reinterpret_cast<const float4*>(task.problem.rotation + i * D + column);
    const float4 x = __ldg(from), y = __ldg(from + 1);
    piece = {half_pair(x.x, x.y), half_pair(x.z, x.w), half_pair(y.x, y.y), half_pair(y.z, y.w)};
  }
  reinterpret_cast<uint4*>(task.rotation)[thread] = piece;
}

// A warp looks at the mask of a tile of rows and a tile of keys.
__global__ void __launch_bounds__(kThreads) look_at_mask(const __grid_constant__ PrefillTask task) {
  wait_for_previous_kernel();
  const AttentionProblem& p = task.problem;
  const int tile = blockIdx.x * (kThreads / 32) + threadIdx.x / 32, row_tile = blockIdx.y;
  if (tile >= task.key_tiles) return;
  const int rows = prefill_rows(static_cast<int>(p.D)), all = task.group * static_cast<int>(p.Lq);
  const int last = (min((row_tile + 1) * rows, all) - 1) / task.group;
  bool any = false, every = true;
  for (int k = threadIdx.x % 32; k < task.keys && tile * task.keys + k < p.Lkv; k += 32) {
    const bool* const column = static_cast<const bool*>(p.mask.data) +
                               offset_of(p.mask, blockIdx.z, 0, 0) +
                               (static_cast<int64_t>(tile) * task.keys + k) * p.mask.stride[3];
#pragma unroll 8
    for (int token = row_tile * rows / task.group; token <= last; ++token) {
      const bool seen = column[token * p.mask.stride[2]];
      any |= seen, every &= seen;
    }
  }
  any = __any_sync(~0u, any), every = __all_sync(~0u, every);
  if (threadIdx.x % 32 == 0)
    task.sights[(static_cast<int64_t>(blockIdx.z) * task.row_tiles + row_tile) * task.key_tiles +
                tile] = every ? kAll
                        : any ? kSome
                              : kNone;
}

}  // namespace

cudaError_t launch_prepare_prefill(const PrefillTask& task, cudaStream_t stream) {
  const cudaError_t error = for_tuned_dim(task.problem.D, [&](auto dim) {
    constexpr int kBlocks = rotation_images(dim) * image_bytes_of(dim) / 16 / kThreads;
    return launch(prepare_prefill<dim>, kBlocks, kThreads, 0, stream, task,
                  task.kind == PrefillKind::hopper);
  });
  if (error != cudaSuccess || !task.sights) return error;
  const dim3 tiles((task.key_tiles + kThreads / 32 - 1) / (kThreads / 32), task.row_tiles,
                   task.problem.mask.stride[0] ? static_cast<unsigned>(task.problem.B) : 1);
  return launch(look_at_mask, tiles, kThreads, 0, stream, task, task.kind == PrefillKind::hopper);
}

}  // namespace tq::cuda
