// The map of the CUDA kernels: what ops.cpp launches. Pointers in a problem are device pointers.
// A launcher returns an error instead of throwing, and neither allocates nor synchronises.
#pragma once

#include <cuda_runtime_api.h>

#include "../problem.h"

namespace tq::cuda {

cudaError_t launch_compress(const CompressProblem& problem, cudaStream_t stream);
cudaError_t launch_decompress(const DecompressProblem& problem, cudaStream_t stream);

}  // namespace tq::cuda
