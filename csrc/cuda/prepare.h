// What a kernel needs before its first launch on a device.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

namespace tq::cuda {

// Lets a kernel have so much shared memory, once on each device, and counts the multiprocessors.
template <auto kKernel>
cudaError_t prepare(int shared_bytes, unsigned* multiprocessors) {
  static std::atomic<uint64_t> prepared{0};
  int device = 0, number = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&number, cudaDevAttrMultiProcessorCount, device);
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (error == cudaSuccess && !(prepared & bit)) {
    error =
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error == cudaSuccess) prepared |= bit;
  }
  *multiprocessors = number;
  return error;
}

}  // namespace tq::cuda
