// What a kernel needs before its first launch on a device, and a launch that overlaps.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

namespace tq::cuda {

// The architecture that the code in use on the current device was compiled for: 90 is compute
// capability 9.0, 0 none.
int compiled_for();

// Lets a kernel have so much shared memory, once on each device, and counts the multiprocessors
// for who wants to know.
template <auto kKernel>
cudaError_t prepare(int shared_bytes, unsigned* multiprocessors = nullptr) {
  static std::atomic<uint64_t> prepared{0};
  int device = 0, number = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess && multiprocessors)
    error = cudaDeviceGetAttribute(&number, cudaDevAttrMultiProcessorCount, device);
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if (error == cudaSuccess && !(prepared & bit)) {
    error =
        cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error == cudaSuccess) prepared |= bit;
  }
  if (multiprocessors) *multiprocessors = number;
  return error;
}

// Launches a kernel. `beside_previous`: it may start while the one before it on the stream still
// runs. Such a kernel waits for that by itself, which takes Hopper (device/ptx.cuh,
// wait_for_previous_kernel).
template <class Task>
cudaError_t launch(void (*kernel)(Task), dim3 grid, int threads, int shared_bytes,
                   cudaStream_t stream, const Task& task, bool beside_previous) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = beside_previous ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, task);
}

}  // namespace tq::cuda
