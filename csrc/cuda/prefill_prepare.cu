// What the prefill kernels need once a call: the rotation in fp16 as images of shared memory
// (prefill.h), and their counters at zero. A thread makes 16 bytes.
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
    for (int i = thread; i < 2 * task.row_tiles * task.heads(); i += threads) task.done[i] = 0;
  if (thread >= rotation_images(D) * kImage / 16) return;
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

}  // namespace

cudaError_t launch_prepare_prefill(const PrefillTask& task, cudaStream_t stream) {
  return for_tuned_dim(task.problem.D, [&](auto dim) {
    constexpr int kBlocks = rotation_images(dim) * image_bytes_of(dim) / 16 / kThreads;
    return launch(prepare_prefill<dim>, kBlocks, kThreads, 0, stream, task, true);
  });
}

}  // namespace tq::cuda
