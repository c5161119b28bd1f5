// Compressed keys and values of a round to images in the workspace (prefill.h). A block has four
// teams of four warps (two at D = 512), half of them for keys, half for values. Each makes an image
// in shared memory and copies it as it is.
//
// Cost: memory, 2.5 bytes a coordinate, most of them to the L2; and look-ups, 2K clocks for a tile
// of 128 keys and values.
#include "prefill_images.cuh"

namespace tq::cuda {
namespace {

template <int D>
struct ExpandShape {
  static constexpr int kTeams = D <= 256 ? 4 : 2, kThreads = 128 * kTeams;
  static constexpr int kImage = image_bytes_of(D), kStage = ImageMaker<D, false>::kStageBytes;
  static constexpr int kTable = kTeams * kImage;
  static constexpr int kStages = kTable + LevelTable::kBytes;
  static constexpr int kNorms = kStages + kTeams * kStage;
  static constexpr int kBytes = kNorms + kTeams / 2 * norm_bytes_of(D);
};

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <int D, bool kValues>
__device__ void make_images(const PrefillTask& task, uint32_t shared) {
  using S = ExpandShape<D>;
  const AttentionProblem& p = task.problem;
  const auto round = task.find_round();
  const int team = threadIdx.x / 128, pair = team / 2;
  const bool leads = threadIdx.x % 128 == 0;
  const uint32_t image = shared + team * S::kImage;
  const int of_values = kValues ? key_norm_bytes_of(D) : 0;
  const uint32_t norms = shared + S::kNorms + pair * norm_bytes_of(D) + of_values;
  ImageMaker<D, kValues> maker(p, shared + S::kTable, shared + S::kStages + team * S::kStage);

  // Adjacent tiles, so that each can be fetched while the one before is made.
  const int64_t total = static_cast<int64_t>(round.heads) * round.tiles;
  const int pairs = S::kTeams / 2 * gridDim.x, mine = S::kTeams / 2 * blockIdx.x + pair;
  const int end = static_cast<int>(total * (mine + 1) / pairs);
  int fetched = -1;
  for (int i = static_cast<int>(total * mine / pairs); i < end; ++i) {
    const int item = round.first + i / round.tiles, j = i % round.tiles;
    const KeyRange keys(p, item / static_cast<int>(p.Hkv), item % static_cast<int>(p.Hkv));
    if (j * prefill_keys(D) >= keys.length || (j + 1) * prefill_keys(D) <= keys.start) continue;
    if (i != fetched) {
      copies_wait<0>();
      maker.start(keys);
      maker.fetch(j);
    }
    if (leads) bulk_stores_wait<0>();
    meet(1 + team, 128);
    const bool more = j + 1 < round.tiles;
    maker.take_norms(norms);
    maker.make(image, more ? j + 1 : j);
    fetched = more ? i + 1 : -1;
    fence_for_async();
    meet(1 + team, 128);
    if (leads) {
      char* const tile = task.tiles + static_cast<int64_t>(i) * tile_bytes_of(D);
      // initcheck knows what a bulk copy has written by its start alone; at D = 512 parts are read.
      constexpr int kPart = D <= 256 ? S::kImage : 4096;
      for (int part = 0; part < S::kImage; part += kPart)
        store_bulk(tile + (kValues ? S::kImage : 0) + part, image + part, kPart);
      store_bulk(tile + 2 * S::kImage + of_values, norms,
                 kValues ? value_norm_bytes_of(D) : key_norm_bytes_of(D));
      bulk_stores_commit();
    }
  }
  copies_wait<0>();
  if (leads) bulk_stores_wait<0>();
}
#endif

template <int D>
__global__ void __launch_bounds__(ExpandShape<D>::kThreads, 1)
    expand(const __grid_constant__ PrefillTask task) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char memory[];
  LevelTable::fill(memory + ExpandShape<D>::kTable, task.problem.centroids);
  __syncthreads();
  wait_for_previous_kernel();
  allow_next_kernel();
  if (threadIdx.x / 128 % 2 == 0)
    make_images<D, false>(task, shared_address(memory));
  else
    make_images<D, true>(task, shared_address(memory));
#endif
}

}  // namespace

cudaError_t launch_expand(const PrefillTask& task, cudaStream_t stream) {
  return for_tuned_dim(task.problem.D, [&](auto dim) {
    using S = ExpandShape<dim>;
    unsigned blocks = 0;
    const cudaError_t error = prepare<expand<dim>>(S::kBytes, &blocks);
    if (error != cudaSuccess) return error;
    return launch(expand<dim>, blocks, S::kThreads, S::kBytes, stream, task, true);
  });
}

}  // namespace tq::cuda
