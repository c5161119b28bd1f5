// The map of the CUDA kernels: what ops.cpp launches. Pointers in a problem are device pointers.
// A launcher returns an error instead of throwing, and neither allocates nor synchronises.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>

#include "../problem.h"

namespace tq::cuda {

// One problem or two of equal sizes and types: the keys and the values of an update.
int64_t compress_workspace(const CompressProblem* problems, int count);  // bytes
cudaError_t launch_compress(const CompressProblem* problems, int count, void* workspace,
                            cudaStream_t stream);
int64_t decompress_workspace(const DecompressProblem& problem);  // bytes
cudaError_t launch_decompress(const DecompressProblem& problem, void* workspace,
                              cudaStream_t stream);

// Attention: the prefill kernels where they fit, or the decode kernels (decode.h), else the general
// one.
int64_t attention_workspace(const AttentionProblem& problem, int multiprocessors);  // bytes
cudaError_t launch_attention(const AttentionProblem& problem, void* workspace, int multiprocessors,
                             cudaStream_t stream);

// Attention of many query rows (prefill.h), and whether it fits and is faster (plan.h).
bool is_prefill(const AttentionProblem& problem);
int64_t prefill_workspace(const AttentionProblem& problem, int multiprocessors);  // bytes
cudaError_t launch_prefill(const AttentionProblem& problem, void* workspace, int multiprocessors,
                           cudaStream_t stream);

// Clocks that a block of the attention kernels waits for others before their work is done without
// them. Tests change it.
extern std::atomic<int64_t> patience;
// Bytes of the workspace for images of keys and values (prefill.h), at most. Tests change it.
extern std::atomic<int64_t> prefill_images;

// Attention of any shape. The workspace is bounded: its size does not depend on Lkv.
int64_t general_workspace(const AttentionProblem& problem, int multiprocessors);  // bytes
cudaError_t launch_general(const AttentionProblem& problem, void* workspace, int multiprocessors,
                           cudaStream_t stream);

}  // namespace tq::cuda
