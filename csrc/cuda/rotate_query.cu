// q̂ = Π · q for every query row, rounded to fp16 under a power of two of its own: what the decode
// kernel multiplies the levels of the keys with. Also makes the exchange's words unwritten.
//
// A block takes 16 rows x 8 coordinates; its 4 warps split the sum over D. Products are exact tf32
// ones: 16-bit queries are tf32 numbers, and Π goes in two parts, which together hold 21 bits. The
// time is nothing but latency, about 1.5 µs, during which the decode kernel starts: so loads are in
// flight together, and registers are so few that a block finds room beside a decode block, of this
// call or the last.
#include <algorithm>

#include "decode_block.cuh"
#include "device/element.cuh"
#include "device/ptx.cuh"
#include "prepare.h"
#include "tuned.h"

namespace tq::cuda {
namespace {

constexpr int kRows = 16, kColumns = 8, kWarps = 4;

__device__ float2 to_floats(uint32_t pair, Dtype dtype) {
  if (dtype == Dtype::bf16)
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000)};
  return __half22float2(as_half2(pair));
}

// Where a query row belongs. Divisions take a microsecond among them, and usually need not be done.
struct Row {
  int head, in_head;  // b · Hkv + h; row of that KV head
  int b, h, s;        // of the query

  __device__ Row(const DecodeTask& task, unsigned row) {
    const AttentionProblem& p = task.problem;
    const unsigned group = task.group, heads = static_cast<unsigned>(p.Hkv);
    const unsigned rows = group * static_cast<unsigned>(p.Lq);
    head = rows == 1 ? row : row / rows, in_head = row - head * rows;
    s = p.Lq == 1 ? 0 : in_head / group;
    b = p.B == 1 ? 0 : head / heads;
    h = (head - b * heads) * group + in_head - s * group;
  }
};

constexpr int kThreads = 32 * kWarps;
constexpr int kLeastBlocks = 128;  // to make words unwritten

// 16 query rows from `first` on, 8 coordinates.
template <int D>
__device__ void rotate(const DecodeTask& task, int first, int total, int column_block) {
  const AttentionProblem& p = task.problem;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;

  // The rows that the lane has numbers of.
  const View& query = p.query;
  const uint16_t* q_row[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const Row row(task, min(first + g + 8 * half, total - 1));  // of no row: never stored
    q_row[half] = static_cast<const uint16_t*>(query.data) + offset_of(query, row.b, row.h, row.s);
  }
  const float* const pi_row = p.rotation + (column_block * kColumns + g) * D;

  // What may have left the L2 since the last time comes back while the kernel before still runs.
  for (int d = 32 * (4 * warp + t); d < D; d += 32 * 4 * kWarps) prefetch(pi_row + d);
  if (threadIdx.x == 0) {
    prefetch(p.centroids);
    if (p.kv_len) prefetch(p.kv_len.data);
  }
  wait_for_previous_kernel();

  // Lane (g, t) of step s: coordinates 16 s + 4 t .. + 3 of rows g, g + 8 and of row g of Π.
  float c[4] = {}, largest[2] = {};
  constexpr int kAtOnce = D <= 16 * kWarps ? 1 : 2;
#pragma unroll 1
  for (int from = warp; from < D / 16; from += kAtOnce * kWarps) {
    uint2 q[kAtOnce][2] = {};
    float4 pi[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int d = 16 * (from + i * kWarps) + 4 * t;
      if (d >= D) break;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        q[i][half] = *reinterpret_cast<const uint2*>(q_row[half] + d);
      pi[i] = *reinterpret_cast<const float4*>(pi_row + d);
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
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
        const float high0 = tf32_part(r[j]), high1 = tf32_part(r[j + 1]);
        mma_tf32(c, a, r[j] - high0, r[j + 1] - high1);
        mma_tf32(c, a, high0, high1);
      }
    }
  }

  // Only now: the next kernel's first deed is to keep the memory busy.
  allow_next_kernel();

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
  if (first + mine >= total) return;
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
  const Row row(task, first + mine);
  const int tile = task.plan.row_tiles == 1 ? 0 : row.in_head / task.plan.tile_rows;
  const int64_t at =
      static_cast<int64_t>(row.head * task.plan.row_tiles + tile) * task.plan.tile_rows +
      row.in_head - tile * task.plan.tile_rows;
  __half* const q = task.q + at * query_stride(D);
  q[column_block * kColumns + column] =
      __float2half(task.problem.scale < 0 ? -sum * down : sum * down);
  if (column_block == 0 && column == 0)
    *reinterpret_cast<float4*>(q + D) = {
        fabsf(task.problem.scale) * up * (kLog2e / (sqrtf(static_cast<float>(D)) * kLevelScale)), 0,
        0, 0};
}

// A block's share of the exchange's words, which nobody needs before the end.
__device__ void make_unwritten(const DecodeTask& task) {
  const float unwritten = __uint_as_float(kUnwritten);
  const int words = exchange_words(task);
#pragma unroll 4
  for (int word = blockIdx.x * kThreads + threadIdx.x; word < words; word += gridDim.x * kThreads)
    store_to_stay(task.partials + word, {unwritten, unwritten, unwritten, unwritten});
}

template <int D>
__global__ void __launch_bounds__(kThreads, 16)
    rotate_kernel(const __grid_constant__ DecodeTask task) {
  const int column_block = blockIdx.x % (D / kColumns), row_block = blockIdx.x / (D / kColumns);
  const int total = static_cast<int>(task.problem.B * task.problem.Hq * task.problem.Lq);
  if (row_block * kRows < total) {
    rotate<D>(task, row_block * kRows, total, column_block);
  } else {
    wait_for_previous_kernel();
    allow_next_kernel();
  }
  make_unwritten(task);
}

template <int D>
cudaError_t launch_rotate(const DecodeTask& task, cudaStream_t stream) {
  const AttentionProblem& p = task.problem;
  const int rows = static_cast<int>(p.B * p.Hq * p.Lq);
  // Only so much shared memory is used that a block still fits beside a decode block (228 KB, less
  // a KB for each and the sums), but few fit on a multiprocessor that decode leaves free: they
  // would queue for its way to the L2.
  constexpr int kBeside = (226 - 4) * 1024 - DecodeShape<D, 1, false>::kBytes;
  constexpr int kShared = std::min(std::max(kBeside, 0), 72 * 1024);
  const bool portable = task.plan.portable;
  const int shared = !portable && task.plan.tile_rows == 8 ? kShared : 0;
  if (const cudaError_t error = prepare<rotate_kernel<D>>(portable ? 0 : kShared);
      error != cudaSuccess)
    return error;
  const int rotating = (rows + kRows - 1) / kRows * (D / kColumns);
  return launch(rotate_kernel<D>, dim3(std::max(rotating, kLeastBlocks)), kThreads, shared, stream,
                task, !portable);
}

}  // namespace

cudaError_t launch_rotate_query(const DecodeTask& task, cudaStream_t stream) {
  return for_tuned_dim(task.problem.D, [&](auto dim) { return launch_rotate<dim>(task, stream); });
}

}  // namespace tq::cuda
