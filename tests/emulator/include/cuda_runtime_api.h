// Fake: the host functions of the CUDA runtime.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include "emu.h"

#ifndef EMU_ARCH
#define EMU_ARCH 900
#endif

enum cudaError {
  cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2, cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDeviceFunction = 98, cudaErrorInvalidResourceHandle = 400, cudaErrorLaunchOutOfResources = 701,
  cudaErrorCooperativeLaunchTooLarge = 720, cudaErrorNotSupported = 801, cudaErrorUnknown = 999,
};
using cudaError_t = cudaError;
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1, cudaDevAttrMaxGridDimX = 5, cudaDevAttrMaxGridDimY = 6, cudaDevAttrMaxGridDimZ = 7,
  cudaDevAttrMaxSharedMemoryPerBlock = 8, cudaDevAttrWarpSize = 10, cudaDevAttrMaxRegistersPerBlock = 12,
  cudaDevAttrClockRate = 13, cudaDevAttrMultiProcessorCount = 16, cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39, cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76, cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxRegistersPerMultiprocessor = 82, cudaDevAttrCooperativeLaunch = 95,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97, cudaDevAttrMaxBlocksPerMultiprocessor = 106,
  cudaDevAttrReservedSharedMemoryPerBlock = 111,
};
struct cudaDeviceProp {
  char name[256];
  size_t sharedMemPerBlock, sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
  int multiProcessorCount, major, minor, maxThreadsPerBlock, maxThreadsPerMultiProcessor, warpSize, regsPerBlock, l2CacheSize;
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9,
  cudaFuncAttributeNonPortableClusterSizeAllowed = 14,
};
enum cudaSharedCarveout { cudaSharedmemCarveoutDefault = -1, cudaSharedmemCarveoutMaxShared = 100, cudaSharedmemCarveoutMaxL1 = 0 };
struct cudaFuncAttributes {
  size_t sharedSizeBytes, constSizeBytes, localSizeBytes;
  int maxThreadsPerBlock, numRegs, ptxVersion, binaryVersion, maxDynamicSharedSizeBytes;
};
enum cudaMemcpyKind { cudaMemcpyHostToHost, cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice, cudaMemcpyDefault };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive, cudaStreamCaptureStatusInvalidated };

cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t);
const char* cudaGetErrorName(cudaError_t);
cudaError_t cudaGetDevice(int*);
cudaError_t cudaSetDevice(int);
cudaError_t cudaGetDeviceCount(int*);
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int);
cudaError_t cudaGetDeviceProperties(cudaDeviceProp*, int);
cudaError_t cudaMalloc(void**, size_t);
template <class T> cudaError_t cudaMalloc(T** p, size_t n) { return cudaMalloc(reinterpret_cast<void**>(p), n); }
cudaError_t cudaMallocAsync(void**, size_t, cudaStream_t);
template <class T> cudaError_t cudaMallocAsync(T** p, size_t n, cudaStream_t s) { return cudaMallocAsync(reinterpret_cast<void**>(p), n, s); }
cudaError_t cudaFree(void*);
cudaError_t cudaFreeAsync(void*, cudaStream_t);
cudaError_t cudaMemset(void*, int, size_t);
cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t = nullptr);
cudaError_t cudaMemcpy(void*, const void*, size_t, cudaMemcpyKind);
cudaError_t cudaMemcpyAsync(void*, const void*, size_t, cudaMemcpyKind, cudaStream_t = nullptr);
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaStreamCreate(cudaStream_t*);
cudaError_t cudaStreamDestroy(cudaStream_t);
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus*);

cudaError_t emu_func_set_attribute(const void*, cudaFuncAttribute, int);
cudaError_t emu_func_get_attributes(cudaFuncAttributes*, const void*);
cudaError_t emu_occupancy(int*, const void*, int threads, size_t smem);
namespace emu {
template <class F> const void* kernel_id(F f) { return (const void*)f; }
}
template <class F> cudaError_t cudaFuncSetAttribute(F f, cudaFuncAttribute a, int v) { return emu_func_set_attribute(emu::kernel_id(f), a, v); }
template <class F> cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, F f) { return emu_func_get_attributes(a, emu::kernel_id(f)); }
template <class F> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, F f, int threads, size_t smem) { return emu_occupancy(n, emu::kernel_id(f), threads, smem); }
template <class F> cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, F f, int threads, size_t smem, unsigned) { return emu_occupancy(n, emu::kernel_id(f), threads, smem); }
template <class F> cudaError_t cudaOccupancyMaxPotentialBlockSize(int* grid, int* block, F, size_t = 0, int = 0) { *grid = emu::options.multiprocessors, *block = 1024; return cudaSuccess; }

enum cudaLaunchAttributeID {
  cudaLaunchAttributeIgnore = 0, cudaLaunchAttributeAccessPolicyWindow = 1, cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4, cudaLaunchAttributeProgrammaticStreamSerialization = 6,
  cudaLaunchAttributePriority = 8,
};
union cudaLaunchAttributeValue {
  char pad[64];
  int cooperative, priority, programmaticStreamSerializationAllowed;
  struct { unsigned x, y, z; } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  char pad[4];
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
namespace emu {
inline Launch from_config(const cudaLaunchConfig_t* c) {
  Launch l{c->gridDim, c->blockDim, c->dynamicSmemBytes};
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    if (c->attrs[i].id == cudaLaunchAttributeCooperative && c->attrs[i].val.cooperative) l.cooperative = true;
    if (c->attrs[i].id == cudaLaunchAttributeClusterDimension &&
        c->attrs[i].val.clusterDim.x * c->attrs[i].val.clusterDim.y * c->attrs[i].val.clusterDim.z > 1)
      fatal("clusters are not emulated");
  }
  return l;
}
template <class... P, size_t... I>
void launch_unpacked(Launch l, void (*k)(P...), void** args, std::index_sequence<I...>) {
  l(k, *static_cast<std::decay_t<P>*>(args[I])...);
}
}  // namespace emu
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*k)(P...), A&&... a) {
  emu::from_config(c)(k, static_cast<A&&>(a)...);
  return cudaPeekAtLastError();
}
template <class... P>
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, void (*k)(P...), void** args) {
  emu::launch_unpacked(emu::from_config(c), k, args, std::index_sequence_for<P...>{});
  return cudaPeekAtLastError();
}
template <class... P>
cudaError_t cudaLaunchKernel(void (*k)(P...), dim3 g, dim3 b, void** args, size_t smem = 0, cudaStream_t = nullptr) {
  emu::launch_unpacked(emu::Launch{g, b, smem}, k, args, std::index_sequence_for<P...>{});
  return cudaPeekAtLastError();
}
template <class... P>
cudaError_t cudaLaunchCooperativeKernel(void (*k)(P...), dim3 g, dim3 b, void** args, size_t smem = 0, cudaStream_t = nullptr) {
  emu::Launch l{g, b, smem};
  l.cooperative = true;
  emu::launch_unpacked(l, k, args, std::index_sequence_for<P...>{});
  return cudaPeekAtLastError();
}
