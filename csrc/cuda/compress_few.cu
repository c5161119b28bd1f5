// compress and update_ of few vectors of 16-bit numbers, a decode step say: one kernel, made of
// latencies only.
//
// A warp forms 8 coordinates of 16 vectors: grid (D/8, vectors/16, keys and values), one warp a
// block, so a decode step of 8 heads at D = 128 is 32 blocks that read 4 KB of the rotation each.
// There is no shared memory and no barrier: all loads are 16 bytes wide and leave before the first
// is awaited (at D = 512 most of the rotation follows the first products), each warp finds
// the lengths of its vectors for itself, and the products are D/16 tensor-core steps on fp16
// operands in the order of compress_tiles.cu. The rotation's row n is column n of operand B, whose
// fragment has the columns of operand A's (codec.cuh): two 16-byte loads of float32 to a chunk.
//
// The policies preserve and unbiased need sums over whole vectors: then one block of 8 warps takes
// all coordinates.
//
// Cost: launch, one round trip to memory and two to the cache (the slot is one of them), about 600
// clocks of arithmetic at D = 128. The rotation is read vectors/16 times from L2 and the vectors
// D/8 times: beyond kFew numbers (compress.cu) compress_tiles.cu is faster.
#include "codec.cuh"

namespace tq::cuda {
namespace {

constexpr int kMaxWarps = 8;

// `chunk` of the thread's row of the rotation.
struct Piece {
  float4 first, second;
};
template <int D>
__device__ Piece load_piece(const float* row, int chunk, int t) {
  const int d = 32 * chunk + 8 * t;
  if (d >= D) return {};
  const auto* from = reinterpret_cast<const float4*>(row + d);
  return {__ldg(from), __ldg(from + 1)};
}

template <int D>
__global__ void __launch_bounds__(32 * kMaxWarps)
    compress_few(const __grid_constant__ CompressProblems problems, const Order order) {
  constexpr int kChunks = chunks_of(D), kAhead = D == 512 ? 3 : kChunks;
  const CompressProblem& p = problems.of[blockIdx.z];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int g = lane / 4, t = lane % 4;
  const bool sums = p.policy != NormPolicy::l2;

  int tile = blockIdx.x * warps + warp;  // of 8 coordinates
  const auto rotation_row = [&] { return p.rotation + (8 * tile + g) * D; };
  Piece piece[kAhead];
#pragma unroll
  for (int c = 0; c < kAhead; ++c) piece[c] = load_piece<D>(rotation_row(), c, t);
  float boundary[kBoundaries];
#pragma unroll
  for (int i = 0; i < kBoundaries; ++i) boundary[i] = __ldg(p.boundaries + i);

  // Lane r's vector.
  const uint32_t vectors = static_cast<uint32_t>(p.B * p.H * p.S);
  const uint32_t vector = kRows * blockIdx.y + lane % kRows;
  const bool exists = vector < vectors;
  const Position at(exists ? vector : 0u, order);

  const int64_t from = offset_of(p.x, at.b, at.h, at.s);
  uint32_t a[2 * kChunks][4];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const auto* x =
        static_cast<const uint16_t*>(p.x.data) + __shfl_sync(~0u, from, g + 8 * row) + 8 * t;
    const bool real = kRows * blockIdx.y + g + 8 * row < vectors;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      uint4 loaded = {};
      if (real && 32 * c + 8 * t < D) loaded = __ldg(reinterpret_cast<const uint4*>(x + 32 * c));
      place(a[2 * c], a[2 * c + 1], row, loaded);
    }
  }
  int64_t slot = exists && lane < kRows ? slot_of(p, at) : -1;
  if (p.slot && p.S > 1 && superseded(p, at, slot)) slot = -1;
  const int64_t row_bytes =
      slot < 0 ? -1 : offset_of(p.packed, at.b, at.h, slot);  // lane r: where the bytes go
  int64_t to[2];
  for (int row = 0; row < 2; ++row) to[row] = __shfl_sync(~0u, row_bytes, g + 8 * row);

  const Lengths lengths = normalise(a, p.x.dtype);

  float length[2] = {}, product[2] = {};  // this thread's part of |ŷ|² and ⟨y, ŷ⟩
  while (true) {
    float y[4] = {};
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const auto [first, second] = piece[c % kAhead];
      if (c + kAhead < kChunks) piece[c % kAhead] = load_piece<D>(rotation_row(), c + kAhead, t);
      mma(y, a[2 * c], half_pair(first.x, first.y), half_pair(first.z, first.w));
      mma(y, a[2 * c + 1], half_pair(second.x, second.y), half_pair(second.z, second.w));
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      int index[2] = {};
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const float value = y[2 * row + side] * lengths.inverse[row];
#pragma unroll
        for (int i = 0; i < kBoundaries; ++i) index[side] += value > boundary[i];
        if (sums) {
          const float level = __ldg(p.centroids + index[side]);
          length[row] += level * level;
          product[row] += level * value;
        }
      }
      if (to[row] >= 0)
        static_cast<uint8_t*>(p.packed.data)[to[row] + (4 * tile + t) * p.packed.stride[3]] =
            pack(index[0], index[1]);
    }
    tile += gridDim.x * warps;
    if (tile >= D / 8) break;
#pragma unroll
    for (int c = 0; c < kAhead; ++c) piece[c] = load_piece<D>(rotation_row(), c, t);
  }

  // Lane r of the first warp stores norm r.
  __shared__ float2 partial[kMaxWarps][kRows];
  if (sums) {
    for (int row = 0; row < 2; ++row) {
      const float2 sum = {quad_sum(length[row]), quad_sum(product[row])};
      if (t == 0) partial[warp][g + 8 * row] = sum;
    }
    __syncthreads();
  }
  const float low = __shfl_sync(~0u, lengths.norm[0], lane % 8 * 4);
  const float high = __shfl_sync(~0u, lengths.norm[1], lane % 8 * 4);
  if (blockIdx.x > 0 || warp > 0 || slot < 0) return;
  float2 sum = {};
  for (int w = 0; sums && w < warps; ++w) {
    sum.x += partial[w][lane].x;
    sum.y += partial[w][lane].y;
  }
  store_element(p.norms, offset_of(p.norms, at.b, at.h, slot),
                stored_norm(p.policy, lane < 8 ? low : high, sum.x, sum.y));
}

}  // namespace

cudaError_t launch_compress_few(const CompressProblems& problems, int count, cudaStream_t stream) {
  const CompressProblem& p = problems.of[0];
  bool sums = false;
  for (int i = 0; i < count; ++i) sums = sums || problems.of[i].policy != NormPolicy::l2;
  return for_tuned_dim(p.D, [&](auto dim) {
    constexpr int D = dim;
    const dim3 grid(sums ? 1 : D / 8, static_cast<unsigned>((p.B * p.H * p.S + kRows - 1) / kRows),
                    count);
    compress_few<D><<<grid, 32 * (sums ? kMaxWarps : 1), 0, stream>>>(problems, Order(p));
    return cudaGetLastError();
  });
}

}  // namespace tq::cuda
