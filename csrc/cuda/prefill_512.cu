#include "prefill_wide.cuh"

namespace tq::cuda {
namespace {

__global__ void __launch_bounds__(WideShape::kThreads, 1)
    wide_prefill_kernel(const __grid_constant__ PrefillTask task) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  WidePrefill::run(task);
#endif
}

}  // namespace

template <>
cudaError_t launch_prefill_dim<512>(const PrefillTask& task, cudaStream_t stream) {
  unsigned blocks = 0;
  const cudaError_t error = prepare<wide_prefill_kernel>(WideShape::kBytes, &blocks);
  if (error != cudaSuccess) return error;
  return launch(wide_prefill_kernel, blocks, WideShape::kThreads, WideShape::kBytes, stream, task,
                true);
}

}  // namespace tq::cuda
