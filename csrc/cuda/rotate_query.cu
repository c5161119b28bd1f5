// q̂ = Π · q for every query row, rounded to fp16 under a power of two of its own: what the decode
// kernel multiplies the levels of the keys with. Also makes the exchange's words unwritten.
//
// A block takes 16 rows x 8 coordinates; its 4 warps split the sum over D. Products are exact tf32
// ones: 16-bit queries are tf32 numbers, and Π goes in two parts, which together hold 21 bits. All
// loads of a warp are in flight at once, since the time is nothing but latency: one look at Π and
// q, about 1.5 µs, during which the decode kernel starts.
#include "decode.h"
#include "device/element.cuh"
#include "device/ptx.cuh"

namespace tq::cuda {
namespace {

constexpr int kRows = 16, kColumns = 8, kWarps = 4;

// Four consecutive coordinates of a 16-bit row as they lie in memory, or zeros.
__device__ uint2 load_four(const View& v, int64_t at, bool whole) {
  const auto* x = static_cast<const uint16_t*>(v.data) + at;
  if (whole) return *reinterpret_cast<const uint2*>(x);
  const int64_t step = v.stride[3];
  return {x[0] | static_cast<uint32_t>(x[step]) << 16,
          x[2 * step] | static_cast<uint32_t>(x[3 * step]) << 16};
}

__device__ float2 to_floats(uint32_t pair, Dtype dtype) {
  if (dtype == Dtype::bf16)
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000)};
  return __half22float2(as_half2(pair));
}

template <int D>
__global__ void __launch_bounds__(32 * kWarps)
    rotate_kernel(const __grid_constant__ DecodeTask task) {
  allow_next_kernel();
  const AttentionProblem& p = task.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int rows_per_head = task.group * static_cast<int>(p.Lq);
  const int64_t total = p.B * p.Hkv * rows_per_head;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kRows;

  // Lane (g, t) of step s: coordinates 16 s + 4 t .. + 3 of rows g, g + 8 and of row g of Π.
  constexpr int kSteps = (D / 16 + kWarps - 1) / kWarps;
  uint2 q[kSteps][2] = {};
  float4 pi[kSteps] = {};
  const View& query = p.query;
  const bool whole = query.stride[3] == 1 && reinterpret_cast<uintptr_t>(query.data) % 8 == 0 &&
                     (query.stride[0] | query.stride[1] | query.stride[2]) % 4 == 0;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t row = first + g + 8 * half;
    if (row >= total) continue;
    const int64_t head = row / rows_per_head;  // b · Hkv + h
    const int in_head = static_cast<int>(row % rows_per_head);
    const int64_t at =
        offset_of(query, head / p.Hkv, head % p.Hkv * task.group + in_head % task.group,
                  in_head / task.group);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const int d = 16 * (warp + i * kWarps) + 4 * t;
      if (d < D) q[i][half] = load_four(query, at + d * query.stride[3], whole);
    }
  }
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int d = 16 * (warp + i * kWarps) + 4 * t;
    if (d < D)
      pi[i] = *reinterpret_cast<const float4*>(
          p.rotation + (static_cast<int64_t>(blockIdx.y) * kColumns + g) * D + d);
  }

  const int64_t words =
      static_cast<int64_t>(task.plan.partial_slots) * partial_words(D, task.plan.tile_rows) +
      static_cast<int64_t>(task.plan.blocks) * result_words(D, task.plan.tile_rows);
  const float unwritten = __uint_as_float(kUnwritten);
  for (int64_t i =
           (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x;
       i < words; i += static_cast<int64_t>(gridDim.x) * gridDim.y * blockDim.x)
    task.partials[i] = {unwritten, unwritten, unwritten, unwritten};  // results follow partials

  float c[4] = {}, largest[2] = {};
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    float x[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 a = to_floats(q[i][half].x, query.dtype),
                   b = to_floats(q[i][half].y, query.dtype);
      x[half][0] = a.x, x[half][1] = a.y, x[half][2] = b.x, x[half][3] = b.y;
#pragma unroll
      for (int j = 0; j < 4; ++j) largest[half] = fmaxf(largest[half], fabsf(x[half][j]));
    }
    const float r[4] = {pi[i].x, pi[i].y, pi[i].z, pi[i].w};
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      const float a[4] = {x[0][j], x[1][j], x[0][j + 1], x[1][j + 1]};
      const float high0 = __uint_as_float(__float_as_uint(r[j]) & 0xFFFFE000);
      const float high1 = __uint_as_float(__float_as_uint(r[j + 1]) & 0xFFFFE000);
      mma_tf32(c, a, r[j] - high0, r[j + 1] - high1);
      mma_tf32(c, a, high0, high1);
    }
  }

  __shared__ float sums[kWarps][kRows][kColumns];
  __shared__ float maxima[kWarps][kRows];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sums[warp][g + 8 * half][2 * t] = c[2 * half];
    sums[warp][g + 8 * half][2 * t + 1] = c[2 * half + 1];
    for (int lanes = 1; lanes < 4; lanes *= 2)
      largest[half] = fmaxf(largest[half], __shfl_xor_sync(~0u, largest[half], lanes));
    if (t == 0) maxima[warp][g + 8 * half] = largest[half];
  }
  __syncthreads();

  const int mine = threadIdx.x / kColumns, column = threadIdx.x % kColumns;
  const int64_t row = first + mine;
  if (row >= total) return;
  float sum = 0, most = 0;
  for (int w = 0; w < kWarps; ++w) {
    sum += sums[w][mine][column];
    most = fmaxf(most, maxima[w][mine]);
  }
  // The power of two that brings the largest coordinate of q to [1, 2): then those of q̂ are at most
  // 2 √D, far inside fp16, and about 1.
  const int exponent = min(max(static_cast<int>(__float_as_uint(most) >> 23) - 127, -120), 120);
  const float down = __uint_as_float(static_cast<uint32_t>(127 - exponent) << 23);
  const float up = __uint_as_float(static_cast<uint32_t>(127 + exponent) << 23);
  const int64_t head = row / rows_per_head;
  const int in_head = static_cast<int>(row % rows_per_head);
  const int64_t at =
      (head * task.plan.row_tiles + in_head / task.plan.tile_rows) * task.plan.tile_rows +
      in_head % task.plan.tile_rows;
  task.q[at * D + blockIdx.y * kColumns + column] =
      __float2half(p.scale < 0 ? -sum * down : sum * down);
  // Positive, so that a hidden score of -inf stays what it is, and 1 over it is finite.
  if (blockIdx.y == 0 && column == 0)
    task.q_scale[at] = fmaxf(
        fabsf(p.scale) * up * (1.4426950408889634f / (sqrtf(static_cast<float>(D)) * kLevelScale)),
        1e-30f);
}

template <int D>
cudaError_t launch(const DecodeTask& task, cudaStream_t stream) {
  const AttentionProblem& p = task.problem;
  const int64_t rows = p.B * p.Hq * p.Lq;
  const dim3 grid(static_cast<unsigned>((rows + kRows - 1) / kRows), D / kColumns);
  rotate_kernel<D><<<grid, 32 * kWarps, 0, stream>>>(task);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_rotate_query(const DecodeTask& task, cudaStream_t stream) {
  switch (task.problem.D) {
    case 64: return launch<64>(task, stream);
    case 80: return launch<80>(task, stream);
    case 96: return launch<96>(task, stream);
    case 128: return launch<128>(task, stream);
    case 192: return launch<192>(task, stream);
    case 256: return launch<256>(task, stream);
    case 512: return launch<512>(task, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace tq::cuda
