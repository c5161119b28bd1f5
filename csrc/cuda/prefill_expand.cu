// Compressed keys and values of a round to images in the workspace (prefill.h). A team of four
// warps makes those of keys, or of values, one at a time in shared memory, and copies each as it
// is. On Hopper a block has four teams (two at D = 512), half of them for keys, and copies are bulk
// copies. The portable kernel's block is one team, for there is no room for more; at D = 512 a team
// makes only half of an image's columns.
//
// Cost: memory, 2.5 bytes a coordinate, most of them to the L2; and look-ups, 2K clocks for a tile
// of 128 keys and values.
#include "prefill_images.cuh"

namespace tq::cuda {
namespace {

template <int D, bool kHopper>
struct ExpandShape {
  static constexpr int kTeams = !kHopper ? 1 : D <= 256 ? 4 : 2, kThreads = 128 * kTeams;
  static constexpr int kColumns = kHopper || D <= 256 ? D : 256;  // that a team makes
  static_assert(prefill_keys(kColumns) == prefill_keys(D));
  static constexpr int kCrew = 2 * D / kColumns;  // teams for all columns of keys and values
  static constexpr int kImage = image_bytes_of(kColumns);
  static constexpr int kStage = ImageMaker<kColumns, false>::kStageBytes;
  static constexpr int kTable = kTeams * kImage;
  static constexpr int kStages = kTable + LevelTable::kBytes;
  static constexpr int kNorms = kStages + kTeams * kStage;
  static constexpr int kBytes = kNorms + (kTeams + 1) / 2 * norm_bytes_of(D);
  static_assert(kBytes <= (kHopper ? 227 * 1024 : kPortableLimit));
};

// From shared memory to the workspace: by a team, or on Hopper by its first thread.
template <bool kHopper>
__device__ void store_image(char* to, uint32_t from, int bytes) {
  if constexpr (kHopper) {
    // initcheck knows what a bulk copy has written by its start alone; at D = 512 parts are read.
    const int part = bytes <= 32768 ? bytes : 4096;
    for (int first = 0; first < bytes; first += part) store_bulk(to + first, from + first, part);
  } else {
    for (int byte = 16 * (threadIdx.x % 128); byte < bytes; byte += 16 * 128) {
      uint32_t x[4];
      load_words(x, from + byte);
      *reinterpret_cast<uint4*>(to + byte) = {x[0], x[1], x[2], x[3]};
    }
  }
}

// By member `member` of a crew.
template <int D, bool kHopper, bool kValues>
__device__ void make_images(const PrefillTask& task, uint32_t shared, int member) {
  using S = ExpandShape<D, kHopper>;
  const AttentionProblem& p = task.problem;
  const auto round = task.find_round();
  const int team = threadIdx.x / 128, part = member / 2;
  const bool leads = threadIdx.x % 128 == 0;
  const uint32_t image = shared + team * S::kImage;
  const int of_values = kValues ? key_norm_bytes_of(D) : 0;
  const uint32_t norms = shared + S::kNorms + team / 2 * norm_bytes_of(D) + of_values;
  ImageMaker<S::kColumns, kValues> maker(p, shared + S::kTable,
                                         shared + S::kStages + team * S::kStage);

  // Adjacent tiles, so that each can be fetched while the one before is made.
  const int64_t total = static_cast<int64_t>(round.heads) * round.tiles;
  const int crews = S::kTeams * gridDim.x / S::kCrew;
  const int mine = (S::kTeams * blockIdx.x + team) / S::kCrew;
  const int end = static_cast<int>(total * (mine + 1) / crews);
  int fetched = -1;
  for (int i = static_cast<int>(total * mine / crews); i < end; ++i) {
    const int item = round.first + i / round.tiles, j = round.tile + i % round.tiles;
    const KeyRange keys(p, item / static_cast<int>(p.Hkv), item % static_cast<int>(p.Hkv));
    if (j * prefill_keys(D) >= keys.length || (j + 1) * prefill_keys(D) <= keys.start) continue;
    if (i != fetched) {
      copies_wait<0>();
      maker.start(keys, part * S::kColumns);
      maker.fetch(j);
    }
    if constexpr (kHopper)
      if (leads) bulk_stores_wait<0>();
    meet(1 + team, 128);
    const bool more = j + 1 < round.tile + round.tiles;
    maker.take_norms(norms);
    maker.make(image, more ? j + 1 : j);
    fetched = more ? i + 1 : -1;
    if constexpr (kHopper) fence_for_async();
    meet(1 + team, 128);
    if (!kHopper || leads) {
      char* const tile = task.tiles + static_cast<int64_t>(i) * tile_bytes_of(D);
      store_image<kHopper>(tile + (kValues ? image_bytes_of(D) : 0) + part * S::kImage, image,
                           S::kImage);
      if (part == 0)
        store_image<kHopper>(tile + 2 * image_bytes_of(D) + of_values, norms,
                             kValues ? value_norm_bytes_of(D) : key_norm_bytes_of(D));
      if constexpr (kHopper) bulk_stores_commit();
    }
  }
  copies_wait<0>();
  if constexpr (kHopper)
    if (leads) bulk_stores_wait<0>();
}

template <int D, bool kHopper>
__global__ void __launch_bounds__(ExpandShape<D, kHopper>::kThreads, 1)
    expand(const __grid_constant__ PrefillTask task) {
  if constexpr (kHopper == kHopperHere) {
    using S = ExpandShape<D, kHopper>;
    extern __shared__ __align__(1024) char memory[];
    LevelTable::fill(memory + S::kTable, task.problem.centroids);
    __syncthreads();
    wait_for_previous_kernel();
    allow_next_kernel();
    const int member = (S::kTeams * blockIdx.x + threadIdx.x / 128) % S::kCrew;
    if (member % 2 == 0)
      make_images<D, kHopper, false>(task, shared_address(memory), member);
    else
      make_images<D, kHopper, true>(task, shared_address(memory), member);
  }
}

template <int D, bool kHopper>
cudaError_t launch_expand_kernel(const PrefillTask& task, cudaStream_t stream) {
  using S = ExpandShape<D, kHopper>;
  unsigned blocks = 0;
  const cudaError_t error = prepare<expand<D, kHopper>>(S::kBytes, &blocks);
  if (error != cudaSuccess) return error;
  // Teams for keys and for values on each multiprocessor, and whole crews.
  if (S::kTeams == 1) blocks = (2 * blocks + S::kCrew - 1) / S::kCrew * S::kCrew;
  return launch(expand<D, kHopper>, blocks, S::kThreads, S::kBytes, stream, task, kHopper);
}

}  // namespace

cudaError_t launch_expand(const PrefillTask& task, cudaStream_t stream) {
  return for_tuned_dim(task.problem.D, [&](auto dim) {
    return task.kind == PrefillKind::hopper ? launch_expand_kernel<dim, true>(task, stream)
                                            : launch_expand_kernel<dim, false>(task, stream);
  });
}

}  // namespace tq::cuda
