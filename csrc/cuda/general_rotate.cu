// The rotations of general attention: float32, as if each sum were computed exactly and rounded
// once. The softmax multiplies an error of q^ by the size of the scores, and this one would be the
// largest of all.
//
// A block takes 8 rows and 32 coordinates: a warp a row, a lane a coordinate, 64 terms at a time.
// Per term: 10 instructions, which is what the loads from shared memory cost.
#include "general.cuh"

namespace tq::cuda {
namespace {

constexpr int kRows = 8;    // of a block
constexpr int kChunk = 64;  // coordinates of the input at a time

template <bool back>
__global__ void __launch_bounds__(32 * kRows)
    rotate_kernel(const AttentionProblem p, const Plan plan) {
  __shared__ __align__(16) float x[kRows][kMaxDim];
  __shared__ float matrix[kChunk][33];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, D = static_cast<int>(p.D);
  const int first_output = blockIdx.y * 32, output = first_output + lane;
  const int64_t slot = int64_t{blockIdx.x} * kRows + warp;
  const Tile tile(p, plan, slot / plan.rows);
  const int row = static_cast<int>(slot % plan.rows);
  const bool has_slot = slot < plan.count * plan.rows, exists = has_slot && row < tile.rows;
  const int64_t place =
      offset_of(back ? p.out : p.query, tile.b, tile.query_head(plan, row), tile.token(plan, row));
  float* rotated = plan.q + slot * plan.width;
  for (int d = lane; d < (D + kChunk - 1) / kChunk * kChunk; d += 32) {
    const bool inside = exists && d < D;
    if constexpr (back)
      x[warp][d] = inside ? rotated[d] : 0;
    else
      x[warp][d] = inside ? load_element(p.query, place + d * p.query.stride[3]) : 0;
  }

  float sum = 0, rest = 0;
  for (int first = 0; first < D; first += kChunk) {
    __syncthreads();
#pragma unroll
    for (int at = threadIdx.x; at < 32 * kChunk; at += 32 * kRows) {  // as they are stored
      const int i = back ? at % 32 : at / kChunk, j = back ? at / 32 : at % kChunk;
      const int to = first_output + i, from = first + j;
      const bool inside = to < D && from < D;
      matrix[j][i] = inside ? p.rotation[back ? from * D + to : to * D + from] : 0;
    }
    __syncthreads();
#pragma unroll 16
    for (int j = 0; j < kChunk; ++j) {
      const float a = matrix[j][lane], b = x[warp][first + j], product = __fmul_rn(a, b);
      float lost;
      sum = add(sum, product, &lost);
      rest += lost + fmaf(a, b, -product);
    }
  }
  if (!(fabsf(sum) < INFINITY)) rest = 0;
  if (!back && has_slot && output < plan.width)
    rotated[output] = fmaf(sum, p.scale, rest * p.scale);
  if (back && exists && output < D)
    store_element(p.out, place + output * p.out.stride[3], sum + rest);
}

template <bool back>
void launch(const AttentionProblem& p, const Plan& plan, cudaStream_t stream) {
  const int64_t slots = plan.count * plan.rows;
  const dim3 grid(static_cast<unsigned>((slots + kRows - 1) / kRows), (plan.width + 31) / 32);
  rotate_kernel<back><<<grid, 32 * kRows, 0, stream>>>(p, plan);
}

}  // namespace

void launch_rotate_to(const AttentionProblem& p, const Plan& plan, cudaStream_t stream) {
  launch<false>(p, plan, stream);
}
void launch_rotate_back(const AttentionProblem& p, const Plan& plan, cudaStream_t stream) {
  launch<true>(p, plan, stream);
}

}  // namespace tq::cuda
