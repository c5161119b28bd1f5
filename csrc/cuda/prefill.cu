// Which problems the prefill kernels take, and their launches.
#include "prefill.h"

#include <algorithm>

namespace tq::cuda {
namespace {

// Fewer rows are for the decode kernels.
constexpr int64_t kLeastRows = 48;
// Images are made once for all tiles of rows, where there are so many: measured on an H200. (At
// D = 256 the fused kernel has less room, and is for contexts that the workspace does not hold.)
constexpr int64_t least_expanded(int64_t D) { return D <= 192 ? 6 : 1; }
constexpr int64_t kImages = int64_t{192} << 20;  // bytes of the workspace, at most

int64_t tiles_of(const AttentionProblem& p) {
  const int keys = prefill_keys(static_cast<int>(p.D));
  return std::max<int64_t>((p.Lkv + keys - 1) / keys, 1);
}
int64_t row_tiles_of(const AttentionProblem& p) {
  const int rows = prefill_rows(static_cast<int>(p.D));
  return (p.Hq / p.Hkv * p.Lq + rows - 1) / rows;
}

// Tiles that the workspace has room for; 0: fused.
int64_t capacity_of(const AttentionProblem& p) {
  if (row_tiles_of(p) < least_expanded(p.D)) return 0;
  const int64_t most = kImages / tile_bytes_of(static_cast<int>(p.D));
  return tiles_of(p) > most ? 0 : std::min(most, tiles_of(p) * p.B * p.Hkv);
}

// Blocks that share a row tile: as many as fill the device once. How many of them have keys is
// found on the device, so that sums do not depend on the length of the buffer.
int splits_of(const AttentionProblem& p, int64_t row_tiles, int multiprocessors) {
  constexpr int64_t kMost = 32;
  const int64_t blocks = row_tiles * p.B * p.Hkv;
  const int64_t useful = (tiles_of(p) + kLeastSplit - 1) / kLeastSplit;
  return static_cast<int>(
      std::clamp<int64_t>(std::min(multiprocessors / blocks, useful), 1, kMost));
}

// The parts of the workspace, each aligned to 128 bytes. Returns its size.
int64_t lay_out(PrefillTask* task, char* memory, int multiprocessors) {
  const AttentionProblem& p = task->problem;
  const int D = static_cast<int>(p.D);
  int64_t size = 0;
  const auto take = [&](int64_t bytes) {
    char* const part = memory + size;
    size += (bytes + 127) / 128 * 128;
    return part;
  };
  task->rotation = take(int64_t{rotation_images(D)} * image_bytes_of(D));
  task->group = static_cast<int>(p.Hq / p.Hkv);
  task->row_tiles = static_cast<int>(row_tiles_of(p));
  task->keys = prefill_keys(D);
  task->capacity = static_cast<int>(capacity_of(p));
  if (task->capacity) task->tiles = take(int64_t{task->capacity} * tile_bytes_of(D));
  task->key_tiles = static_cast<int>(tiles_of(p));
  if (p.mask)
    task->sights = reinterpret_cast<Sight*>(
        take((p.mask.stride[0] ? p.B : 1) * row_tiles_of(p) * tiles_of(p)));
  task->splits = splits_of(p, task->row_tiles, multiprocessors);
  if (task->splits > 1) {
    const int64_t parts = 2 * int64_t{task->row_tiles} * task->heads();
    task->done = reinterpret_cast<int*>(take(parts * int64_t{sizeof(int)}));
    task->partials = reinterpret_cast<float4*>(
        take(parts * task->splits * partial_words_of(D) * int64_t{sizeof(float4)}));
  }
  return size;
}

}  // namespace

bool is_prefill(const AttentionProblem& p) {
  const int architecture = compiled_for();
  const int64_t rows = p.Hq / p.Hkv * p.Lq, load = p.D % 32 == 0 ? 16 : 8;
  return architecture >= 90 && architecture < 100 && tuned_dim(p.D) &&
         (p.D <= 256 || capacity_of(p) > 0) && rows >= kLeastRows && rows * p.B * p.Hkv < 1 << 30 &&
         p.Lkv < int64_t{1} << 30 && p.query.dtype != Dtype::f32 && aligned_rows(p.query, 2, 4) &&
         aligned_rows(p.out, 2, 4) && aligned_rows(p.k_packed, 1, load) &&
         aligned_rows(p.v_packed, 1, load) && reinterpret_cast<uintptr_t>(p.rotation) % 16 == 0;
}

int64_t prefill_workspace(const AttentionProblem& p, int multiprocessors) {
  PrefillTask task = {};
  task.problem = p;
  return lay_out(&task, nullptr, multiprocessors);
}

cudaError_t launch_prefill(const AttentionProblem& p, void* workspace, int multiprocessors,
                           cudaStream_t stream) {
  PrefillTask task = {};
  task.problem = p;
  lay_out(&task, static_cast<char*>(workspace), multiprocessors);
  const int64_t heads = task.heads();
  const int64_t each = task.capacity ? std::max<int64_t>(task.capacity / tiles_of(p), 1) : heads;
  cudaError_t error = launch_prepare_prefill(task, stream);
  for (; task.round * each < heads && error == cudaSuccess; ++task.round) {
    if (task.capacity) error = launch_expand(task, stream);
    if (error != cudaSuccess) break;
    error = for_tuned_dim(p.D, [&](auto dim) { return launch_prefill_dim<dim>(task, stream); });
  }
  return error;
}

}  // namespace tq::cuda
