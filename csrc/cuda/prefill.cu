// Which problems the prefill kernels take, and their launches.
#include "prefill.h"

#include <algorithm>

namespace tq::cuda {
namespace {

constexpr int64_t kCarried = 4;  // the room for images is so many times that for carried sums

int64_t tiles_of(const AttentionProblem& p) {
  const int keys = prefill_keys(static_cast<int>(p.D));
  return std::max<int64_t>((p.Lkv + keys - 1) / keys, 1);
}
int64_t row_tiles_of(const AttentionProblem& p) {
  const int rows = prefill_rows(static_cast<int>(p.D));
  return (p.Hq / p.Hkv * p.Lq + rows - 1) / rows;
}

struct Layout {
  int64_t bytes;
  int rounds;  // at most
};

// The parts of the workspace, each aligned to 128 bytes.
Layout lay_out(PrefillTask* task, char* memory, int multiprocessors) {
  const AttentionProblem& p = task->problem;
  const int D = static_cast<int>(p.D);
  int64_t size = 0;
  const auto take = [&](int64_t bytes) {
    char* const part = memory + size;
    size += (bytes + 127) / 128 * 128;
    return part;
  };
  task->kind = prefill_kind(compiled_for());
  task->blocks =
      multiprocessors * (task->kind == PrefillKind::hopper ? 1 : portable_prefill_blocks(D));
  task->rotation = take(int64_t{rotation_images(D)} * image_bytes_of(D));
  task->group = static_cast<int>(p.Hq / p.Hkv);
  task->row_tiles = static_cast<int>(row_tiles_of(p));
  task->keys = prefill_keys(D);
  task->key_tiles = static_cast<int>(tiles_of(p));
  task->windows = 1;
  int64_t each = task->heads(), rounds = 1;  // KV heads of a round
  if (task->row_tiles >= least_expanded_tiles(task->kind, D)) {
    const int64_t images = prefill_images, room = std::max<int64_t>(images / tile_bytes_of(D), 1);
    if (room >= task->key_tiles) {
      each = heads_of_round(each, room / task->key_tiles);
      rounds = (task->heads() + each - 1) / each;
      task->capacity = static_cast<int>(each * task->key_tiles);
    } else {
      const int64_t sums = 2 * partial_words_of(D) * int64_t{sizeof(float4)};
      each = 1;
      task->capacity = static_cast<int>(room);
      task->windows = static_cast<int>((task->key_tiles + room - 1) / room);
      task->slice =
          static_cast<int>(std::clamp<int64_t>(images / kCarried / sums, 1, task->row_tiles));
      task->carry = reinterpret_cast<float4*>(take(task->slice * sums));
      rounds = int64_t{task->heads()} * task->windows *
               ((task->row_tiles + task->slice - 1) / task->slice);
    }
    task->tiles = take(int64_t{task->capacity} * tile_bytes_of(D));
  }
  if (p.mask)
    task->sights = reinterpret_cast<Sight*>(
        take((p.mask.stride[0] ? p.B : 1) * row_tiles_of(p) * tiles_of(p)));
  task->splits =
      static_cast<int>(prefill_splits(task->row_tiles * each, task->key_tiles, task->blocks));
  if (task->splits > 1) {
    const int64_t items = int64_t{task->row_tiles} * task->heads();
    task->done = reinterpret_cast<unsigned long long*>(
        take(2 * task->windows * items * int64_t{sizeof(int64_t)}));
    // All that are split run at once.
    const int64_t parts = std::min<int64_t>(items * task->splits, task->blocks);
    task->partials =
        reinterpret_cast<float4*>(take(2 * parts * partial_words_of(D) * int64_t{sizeof(float4)}));
  }
  return {size, static_cast<int>(rounds)};
}

}  // namespace

std::atomic<int64_t> prefill_images = int64_t{160} << 20;

bool is_prefill(const AttentionProblem& p) {
  const PrefillKind kind = prefill_kind(compiled_for());
  const int64_t rows = p.Hq / p.Hkv * p.Lq, load = p.D % 32 == 0 ? 16 : 8;
  const int64_t least = least_prefill_rows(kind, p.D, p.B * p.Hkv * p.Lkv);
  constexpr int64_t kGrid = 65535;  // look_at_mask
  return kind != PrefillKind::none && tuned_dim(p.D) && rows >= least &&
         (!p.mask || (row_tiles_of(p) <= kGrid && p.B <= kGrid)) && rows * p.B * p.Hkv < 1 << 30 &&
         p.Lkv < int64_t{1} << 30 && p.query.dtype != Dtype::f32 && aligned_rows(p.query, 2, 16) &&
         aligned_rows(p.out, 2, 16) && aligned_rows(p.k_packed, 1, load) &&
         aligned_rows(p.v_packed, 1, load) && reinterpret_cast<uintptr_t>(p.rotation) % 16 == 0;
}

int64_t prefill_workspace(const AttentionProblem& p, int multiprocessors) {
  PrefillTask task = {};
  task.problem = p;
  return lay_out(&task, nullptr, multiprocessors).bytes;
}

cudaError_t launch_prefill(const AttentionProblem& p, void* workspace, int multiprocessors,
                           cudaStream_t stream) {
  PrefillTask task = {};
  task.problem = p;
  task.patience = patience;
  const int rounds = lay_out(&task, static_cast<char*>(workspace), multiprocessors).rounds;
  cudaError_t error = launch_prepare_prefill(task, stream);
  for (; task.round != rounds && error == cudaSuccess; ++task.round) {
    if (task.tiles) error = launch_expand(task, stream);
    if (error != cudaSuccess) break;
    error = for_tuned_dim(p.D, [&](auto dim) {
      return task.kind == PrefillKind::hopper ? launch_prefill_dim<dim>(task, stream)
                                              : launch_portable_prefill<dim>(task, stream);
    });
  }
  return error;
}

}  // namespace tq::cuda
