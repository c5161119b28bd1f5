// compress and update_ of many vectors of 16-bit numbers.
//
// One persistent block on each SM, of `kGroups` warpgroups. A warpgroup takes 64 vectors at a time,
// a warp 16 of them (compress_rows.cuh), fetches the next while it multiplies these with the
// rotation (codec_rotation.cuh), 64 coordinates at a time, and encodes the result. Up to D = 256
// the rotation stays in shared memory and warpgroups work on their own; for D = 512 it streams by
// and the two warpgroups take turns, 32 coordinates at a time.
//
//            shared memory of a block
//   D <= 256   rotation 2 D²                  next vectors 32 D a warp     (D = 128: 32 + 64 KB)
//   D = 512    rotation 3 x 32 rows, 96 KB    next vectors 128 KB
//
// Per coordinate, in clocks of an SM: memory 0.15 (2.5 bytes at 4.3 TB/s); tensor cores D / 2048,
// and as much for D = 512 to bring the rotation from L2 (8 bytes); 16 instructions, 0.13: 6 to
// encode, 2 to make fp16, 1 for norms, 4 to find where vectors lie, D / 128 for the products. On an
// H200 instructions leave every 2 clocks and not every one, for they wait on each other, and a
// block has no registers for more warps: 0.18 clocks for D = 128. The start takes 5 us: launches,
// the kernel that prepares, the rotation's way.
#include <algorithm>

#include "codec_rotation.cuh"
#include "compress_rows.cuh"

namespace tq::cuda {
namespace {

template <int D>
struct Shape {
  static constexpr int kGroups = tile_groups(D);
  static constexpr int kGroupBytes = 4 * Rows<D>::kBytes;
};

struct Task {
  CompressProblem of[2];
  Order order;
  const Prepared* prepared;
};

template <int D>
__global__ void __launch_bounds__(128 * Shape<D>::kGroups, 1)
    compress_tiles(const __grid_constant__ Task task) {
  constexpr bool kStreams = Rotation<D>::kStreams;
  extern __shared__ __align__(128) uint8_t shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const CompressProblem& p = task.of[uniform(blockIdx.y)];
  const uint32_t address = shared_address(shared);
  const uint32_t stride = gridDim.x * (blockDim.x / 128);
  uint32_t tile = blockIdx.x + gridDim.x * (warp / 4);

  Rows<D> rows(p, task.order, address + Rotation<D>::kBytes + warp * Rows<D>::kBytes);
  const auto fetch = [&] {
#pragma unroll
    for (int c = 0; c < rows.kChunks; ++c) rows.fetch(c);
    copies_commit();
  };
  rows.aim(tile);
  fetch();
  const Encoder encoder(p.boundaries);
  const float level = p.centroids ? p.centroids[lane % kLevels] : 0;

  wait_for_previous_kernel();
  const bool ascending = !p.slot || __all_sync(~0u, task.prepared->ascending[lane]);
  Rotation<D> rotation(address, task.prepared);

  // A block that streams the rotation stays together, and has a tile as long as its first warp has.
  for (; (kStreams ? tile - gridDim.x * (warp / 4) : tile) < rows.tiles(); tile += stride) {
    copies_wait<0>();
    uint32_t a[rows.kSteps][4];
    rows.take(a);
    rows.aim(tile + stride);
    fetch();
    rows.find_slots(ascending);

    const auto coordinates = [&]<int N>(int first) {
      float y[N / 2];
      uint32_t word[2];
      rotation.multiply_first(y, a, first);
      for (int r = 0; r < 2; ++r) word[r] = rows.template encode<0>(encoder, y, r, level);
      rotation.multiply_second(y, a, first);
      for (int r = 0; r < 2; ++r)
        rows.template store<N / 8>(first, r, word[r],
                                   rows.template encode<1>(encoder, y, r, level));
    };
    by_coordinates<D>(coordinates);
    rows.store_norms();
  }
  copies_wait<0>();
  rotation.end();
}

// Warpgroups that fit a block of this device; 0: none.
template <int D>
int groups_that_fit() {
  const int fit = (shared_limit() - Rotation<D>::kBytes) / Shape<D>::kGroupBytes;
  return std::clamp(fit, 0, Shape<D>::kGroups);
}

}  // namespace

bool compress_tiles_fit(const CompressProblem& p) {
  return aligned_rows(p.packed, 1, 8) &&
         for_tuned_dim(p.D, [](auto dim) { return groups_that_fit<dim>() > 0; });
}

cudaError_t launch_compress_tiles(const CompressProblems& problems, int count, void* workspace,
                                  cudaStream_t stream) {
  const CompressProblem& p = problems.of[0];
  auto* const prepared = static_cast<Prepared*>(workspace);
  if (const cudaError_t error = launch_prepare_compress(p, prepared, stream); error != cudaSuccess)
    return error;
  return for_tuned_dim(p.D, [&](auto dim) {
    constexpr int D = dim;
    const int groups = groups_that_fit<D>();
    const int bytes = Rotation<D>::kBytes + groups * Shape<D>::kGroupBytes;
    unsigned blocks = 0;
    const cudaError_t error = prepare<compress_tiles<D>>(bytes, &blocks);
    if (error != cudaSuccess) return error;
    const int64_t tiles = (p.B * p.H * p.S + 63) / 64;
    const auto useful = static_cast<unsigned>((tiles + groups - 1) / groups);
    const dim3 grid(std::min(std::max(blocks / count, 1u), useful), count);
    return launch(compress_tiles<D>, grid, 128 * groups, bytes, stream,
                  Task{{problems.of[0], problems.of[1]}, Order(p), prepared}, compiled_for() >= 90);
  });
}

}  // namespace tq::cuda
