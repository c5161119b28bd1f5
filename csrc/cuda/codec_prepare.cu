// What the kernels of tiles need, made once before them: the rotation as operand B of their
// products, in fp16 and in the order in which it lies in shared memory, and whether slots ascend.
//
// A thread makes 16 bytes, 8 columns of a row of B. D = 128: 16 blocks, and 32 for the slots, about
// 2 us that the kernel of tiles, started beside this one, spends fetching its first vectors. Were
// each of its blocks to do it, they would read twice the bytes from L2 and run 132 times the
// instructions: 4 us at D = 128, 10 us at D = 256.
#include "compress_rows.cuh"
#include "decompress_rows.cuh"

namespace tq::cuda {
namespace {

constexpr int kThreads = 128;

// Row 8i .. of B, column 8j ..: piece number (i K/8 + j) 8 + row.
struct Place {
  unsigned n, k;
  template <int D>
  static __device__ Place of_piece(unsigned piece) {
    constexpr unsigned K = 32 * chunks_of(D);
    return {piece / K * 8 + piece % 8, piece / 8 % (K / 8) * 8};
  }
};

template <int D>
constexpr int kPieces = rotation_bytes(D) / 16;
template <int D>
constexpr int kBlocks = (kPieces<D> + kThreads - 1) / kThreads;

struct Task {
  const float* rotation;
  Prepared* prepared;
  CompressProblem problem;  // of compress
};

// Whether this thread's share of the slots ascends, after those to be skipped: then no token
// supersedes another.
template <class Int>
__device__ bool ascend(const Int* slots, int64_t stride, int64_t count) {
  constexpr int kStep = kThreads * Prepared::kShares;
  const int first = (blockIdx.x % Prepared::kShares) * kThreads + threadIdx.x;
  bool all = true;
#pragma unroll 4
  for (int64_t s = first; s + 1 < count; s += kStep) {
    const Int before = slots[s * stride], after = slots[(s + 1) * stride];
    all &= before < after || (before < 0 && after < 0);
  }
  return all;
}

__device__ void look_at_slots(const CompressProblem& p, Prepared* prepared) {
  bool all = true;
  const Integers& slots = p.slot;
  for (int64_t b = 0; b < (slots.stride[0] ? p.B : 1); ++b) {
    const int64_t row = b * slots.stride[0];
    all &= slots.wide ? ascend(static_cast<const int64_t*>(slots.data) + row, slots.stride[1], p.S)
                      : ascend(static_cast<const int32_t*>(slots.data) + row, slots.stride[1], p.S);
  }
  all = __syncthreads_and(all);
  if (threadIdx.x == 0) prepared->ascending[blockIdx.x % Prepared::kShares] = all;
}

// Row n of B is the row of the rotation that makes coordinate `column(n)`. The first blocks look at
// the slots, if there are any.
template <int D>
__global__ void __launch_bounds__(kThreads) prepare_compress(const __grid_constant__ Task task) {
  wait_for_previous_kernel();
  allow_next_kernel();
  unsigned block = blockIdx.x;
  if (task.problem.slot) {
    if (block < Prepared::kShares) return look_at_slots(task.problem, task.prepared);
    block -= Prepared::kShares;
  }
  const unsigned piece = block * kThreads + threadIdx.x;
  if (piece >= kPieces<D>) return;
  const Place at = Place::of_piece<D>(piece);
  float4 x = {}, y = {};
  if (at.k < D) {
    const float* from = task.rotation + Rows<D>::column(at.n) * D + at.k;
    x = __ldg(reinterpret_cast<const float4*>(from));
    y = __ldg(reinterpret_cast<const float4*>(from) + 1);
  }
  task.prepared->rotation[piece] = {half_pair(x.x, x.y), half_pair(x.z, x.w), half_pair(y.x, y.y),
                                    half_pair(y.z, y.w)};
}

// Row n of B is the column of the rotation that makes coordinate `column(n)`, its numbers in the
// order of `coordinate`.
template <int D>
__global__ void __launch_bounds__(kThreads) prepare_decompress(const __grid_constant__ Task task) {
  using R = CompressedRows<D>;
  wait_for_previous_kernel();
  allow_next_kernel();
  const unsigned piece = blockIdx.x * kThreads + threadIdx.x;
  if (piece >= kPieces<D>) return;
  const Place at = Place::of_piece<D>(piece);
  const unsigned row = R::coordinate(at.k);
  const float* from = task.rotation + row * D + R::column(at.n);
  float x[8] = {};
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (row + R::coordinate(j) < D) x[j] = __ldg(from + R::coordinate(j) * D);
  task.prepared->rotation[piece] = {half_pair(x[0], x[1]), half_pair(x[2], x[3]),
                                    half_pair(x[4], x[5]), half_pair(x[6], x[7])};
}

}  // namespace

cudaError_t launch_prepare_compress(const CompressProblem& p, Prepared* to, cudaStream_t stream) {
  return for_tuned_dim(p.D, [&](auto dim) {
    const int shares = p.slot ? Prepared::kShares : 0;
    return launch(prepare_compress<dim>, shares + kBlocks<dim>, kThreads, 0, stream,
                  Task{p.rotation, to, p}, compiled_for() >= 90);
  });
}

cudaError_t launch_prepare_decompress(const DecompressProblem& p, Prepared* to,
                                      cudaStream_t stream) {
  return for_tuned_dim(p.D, [&](auto dim) {
    return launch(prepare_decompress<dim>, kBlocks<dim>, kThreads, 0, stream,
                  Task{p.rotation, to, {}}, compiled_for() >= 90);
  });
}

}  // namespace tq::cuda
