// compress for every head dim, type and stride, written for correctness on every architecture:
// float32 throughout, the rotation read from the L2 cache.
//
// A block of 4 warps takes 8 vectors. One warp per vector finds its length; then each warp takes
// every fourth row of the rotation, its lanes along the row, and forms the 8 products with it. Per
// coordinate: D multiply-adds and D/8 loads of the rotation.
#include "codec.cuh"

namespace tq::cuda {
namespace {

constexpr int kVectors = 8;
constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;

__device__ float warp_sum(float x) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}
__device__ float warp_max(float x) {  // NaN wins
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const float other = __shfl_xor_sync(~0u, x, lanes);
    x = other > x || other != other ? other : x;
  }
  return x;
}

// Vector `vector` of x, less its offset, to x[D] in shared memory, as a unit vector, or as 0 if it
// has no direction. Returns its length. By one warp.
__device__ float load_direction(const CompressProblem& p, int64_t vector, float* x) {
  const int lane = threadIdx.x % 32, D = static_cast<int>(p.D);
  const Position at(vector, p.H, p.S);
  const int64_t from = offset_of(p.x, at.b, at.h, at.s);
  const int64_t offset = offset_of(p.offset, at.b, at.h, 0);
  float largest = 0;
  for (int d = lane; d < D; d += 32) {
    float value = load_element(p.x, from + d * p.x.stride[3]);
    if (p.offset) value -= load_element(p.offset, offset + d * p.offset.stride[3]);
    x[d] = value;
    largest = fabsf(value) > largest || value != value ? fabsf(value) : largest;
  }
  largest = warp_max(largest);
  // The squares of 1e-30 or 1e30 do not fit a float: the largest coordinate is divided out.
  float norm = largest;
  if (largest > 0 && largest < INFINITY) {
    float squares = 0;
    for (int d = lane; d < D; d += 32) squares += x[d] / largest * (x[d] / largest);
    norm = largest * sqrtf(warp_sum(squares));
  }
  const bool has_direction = norm > 0 && norm < INFINITY;
  for (int d = lane; d < D; d += 32) x[d] = has_direction ? x[d] / norm : 0;
  return norm;
}

__global__ void __launch_bounds__(kThreads)
    compress_kernel(const __grid_constant__ CompressProblems problems) {
  const CompressProblem& p = problems.of[blockIdx.y];
  extern __shared__ float shared[];
  float* x = shared;                   // [kVectors][D]
  float* y = shared + kVectors * p.D;  // [kVectors][D], rotated
  __shared__ float norm[kVectors];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, D = static_cast<int>(p.D);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kVectors, total = p.B * p.H * p.S;
  const int count = static_cast<int>(min(static_cast<int64_t>(kVectors), total - first));

  for (int v = warp; v < kVectors; v += kWarps) {
    if (v < count) {
      const float length = load_direction(p, first + v, x + v * D);
      if (lane == 0) norm[v] = length;
    } else {
      for (int d = lane; d < D; d += 32) x[v * D + d] = 0;
    }
  }
  __syncthreads();

  for (int row = warp; row < D; row += kWarps) {
    float sum[kVectors] = {};
    for (int d = lane; d < D; d += 32) {
      const float r = p.rotation[row * D + d];
#pragma unroll
      for (int v = 0; v < kVectors; ++v) sum[v] += r * x[v * D + d];
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const float whole = warp_sum(sum[v]);
      if (lane == 0) y[v * D + row] = whole;
    }
  }
  __syncthreads();

  for (int v = warp; v < count; v += kWarps) {
    const Position at(first + v, p.H, p.S);
    const int64_t slot = slot_of(p, at);
    if (slot < 0) continue;
    // Of the warp's lanes, the first asks.
    if (p.slot && __any_sync(~0u, superseded(p, at, lane == 0 ? slot : -1))) continue;
    auto* bytes = static_cast<uint8_t*>(p.packed.data) + offset_of(p.packed, at.b, at.h, slot);
    float length = 0, product = 0;  // |ŷ|², ⟨y, ŷ⟩
    for (int j = lane; j < D / 2; j += 32) {
      int index[2] = {};
      for (int side = 0; side < 2; ++side) {
        const float value = y[v * D + 2 * j + side];
        for (int i = 0; i < kBoundaries; ++i) index[side] += value > p.boundaries[i];
        if (p.policy != NormPolicy::l2) {
          const float rounded = p.centroids[index[side]];
          length += rounded * rounded;
          product += rounded * value;
        }
      }
      bytes[j * p.packed.stride[3]] = pack(index[0], index[1]);
    }
    const float stored = stored_norm(p.policy, norm[v], warp_sum(length), warp_sum(product));
    if (lane == 0) store_element(p.norms, offset_of(p.norms, at.b, at.h, slot), stored);
  }
}

}  // namespace

cudaError_t launch_compress_general(const CompressProblems& problems, int count,
                                    cudaStream_t stream) {
  const CompressProblem& p = problems.of[0];
  const dim3 grid(static_cast<unsigned>((p.B * p.H * p.S + kVectors - 1) / kVectors), count);
  compress_kernel<<<grid, kThreads, 2 * kVectors * p.D * sizeof(float), stream>>>(problems);
  return cudaGetLastError();
}

}  // namespace tq::cuda
