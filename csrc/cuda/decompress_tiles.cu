// decompress to 16-bit numbers.
//
// One persistent block on each SM, of `kGroups` warpgroups. A warpgroup takes 64 vectors at a time,
// a warp 16 of them (decompress_rows.cuh), asks for the next, and multiplies with the transposed
// rotation, 64 coordinates at a time (codec_rotation.cuh). Up to D = 256 the rotation stays in
// shared memory and warpgroups work on their own; for D = 512 it streams by and the two warpgroups
// take turns, 32 coordinates at a time.
//
// Shared memory: the table of levels, 64 KB, and the rotation, 2 D² bytes or 96 KB.
//
// Per coordinate, in clocks of an SM: memory 0.15 (2.5 bytes at 4.3 TB/s); tensor cores D / 2048,
// and as much for D = 512 to bring the rotation from L2 (8 bytes); shared memory 0.05; about 7
// instructions, 0.055. On an H200 D = 128 takes 0.17.
#include <algorithm>

#include "codec_rotation.cuh"
#include "decompress_rows.cuh"

namespace tq::cuda {
namespace {

template <int D>
struct Shape {
  static constexpr int kGroups = tile_groups(D);
  static constexpr int kSharedBytes = Levels::kBytes + Rotation<D>::kBytes;
};

struct Task {
  DecompressProblem problem;
  Order order;
  const Prepared* prepared;
};

template <int D>
__global__ void __launch_bounds__(128 * Shape<D>::kGroups, 1)
    decompress_tiles(const __grid_constant__ Task task) {
  constexpr int kGroups = Shape<D>::kGroups;
  extern __shared__ __align__(256) char shared[];
  const int group = threadIdx.x / 128;
  uint32_t tile = blockIdx.x + gridDim.x * group;

  CompressedRows<D> rows(task.problem, task.order);
  rows.fetch(tile);
  Levels levels;
  levels.template fill<4 * kGroups>(shared, task.problem.centroids);

  wait_for_previous_kernel();
  Rotation<D> rotation(shared_address(shared) + Levels::kBytes, task.prepared);

  // A block that streams the rotation stays together, and has a tile as long as its first warp has.
  for (; (Rotation<D>::kStreams ? tile - gridDim.x * group : tile) < rows.tiles();
       tile += gridDim.x * kGroups) {
    uint32_t a[rows.kSteps][4];
    rows.take(a, levels);
    rows.fetch(tile + gridDim.x * kGroups);

    const auto coordinates = [&]<int N>(int first) {
      float y[N / 2];
      rotation.multiply_first(y, a, first);
      rows.template store<0>(y, first);
      rotation.multiply_second(y, a, first);
      rows.template store<1>(y, first);
    };
    by_coordinates<D>(coordinates);
  }
  rotation.end();
}

}  // namespace

bool decompress_tiles_fit(const DecompressProblem& p) {
  return for_tuned_dim(p.D, [&](auto dim) {
    return aligned_rows(p.packed, 1, CompressedRows<dim>::kPiece) &&
           Shape<dim>::kSharedBytes <= shared_limit();
  });
}

cudaError_t launch_decompress_tiles(const DecompressProblem& p, void* workspace,
                                    cudaStream_t stream) {
  auto* const prepared = static_cast<Prepared*>(workspace);
  if (const cudaError_t error = launch_prepare_decompress(p, prepared, stream);
      error != cudaSuccess)
    return error;
  return for_tuned_dim(p.D, [&](auto dim) {
    constexpr int D = dim, kGroups = Shape<D>::kGroups;
    unsigned blocks = 0;
    const cudaError_t error = prepare<decompress_tiles<D>>(Shape<D>::kSharedBytes, &blocks);
    if (error != cudaSuccess) return error;
    const int64_t tiles = (p.B * p.H * p.S + 63) / 64;
    blocks = std::min(blocks, static_cast<unsigned>((tiles + kGroups - 1) / kGroups));
    return launch(decompress_tiles<D>, blocks, 128 * kGroups, Shape<D>::kSharedBytes, stream,
                  Task{p, Order(p), prepared}, compiled_for() >= 90);
  });
}

}  // namespace tq::cuda
