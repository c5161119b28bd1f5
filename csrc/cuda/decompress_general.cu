// decompress for every head dim, type and stride, written for correctness on every architecture:
// float32 throughout, the rotation read from the L2 cache.
//
// A block of 4 warps takes 8 vectors, each thread every 128th column of the rotation. Per
// coordinate: D multiply-adds and D/8 loads of the rotation.
#include "codec.cuh"

namespace tq::cuda {
namespace {

constexpr int kVectors = 8;
constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) decompress_kernel(const DecompressProblem p) {
  extern __shared__ float y[];  // [kVectors][D]
  const int D = static_cast<int>(p.D);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kVectors, total = p.B * p.H * p.S;
  const int count = static_cast<int>(min(static_cast<int64_t>(kVectors), total - first));

  for (int i = threadIdx.x; i < kVectors * D / 2; i += kThreads) {
    const int v = i / (D / 2), j = i % (D / 2);
    if (v >= count) break;
    const Position at(first + v, p.H, p.S);
    const uint8_t byte = static_cast<const uint8_t*>(
        p.packed.data)[offset_of(p.packed, at.b, at.h, at.s) + j * p.packed.stride[3]];
    y[v * D + 2 * j] = p.centroids[even_index(byte)];
    y[v * D + 2 * j + 1] = p.centroids[odd_index(byte)];
  }
  __syncthreads();

  for (int d = threadIdx.x; d < D; d += kThreads) {
    float sum[kVectors] = {};
    for (int row = 0; row < D; ++row) {
      const float r = p.rotation[row * D + d];
#pragma unroll
      for (int v = 0; v < kVectors; ++v)
        if (v < count) sum[v] += r * y[v * D + row];
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (v >= count) break;
      const Position at(first + v, p.H, p.S);
      float value = sum[v] * load_element(p.norms, offset_of(p.norms, at.b, at.h, at.s));
      if (p.offset)
        value +=
            load_element(p.offset, offset_of(p.offset, at.b, at.h, 0) + d * p.offset.stride[3]);
      store_element(p.x, offset_of(p.x, at.b, at.h, at.s) + d, value);
    }
  }
}

}  // namespace

cudaError_t launch_decompress_general(const DecompressProblem& p, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((p.B * p.H * p.S + kVectors - 1) / kVectors);
  decompress_kernel<<<blocks, kThreads, kVectors * p.D * sizeof(float), stream>>>(p);
  return cudaGetLastError();
}

}  // namespace tq::cuda
