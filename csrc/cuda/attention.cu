// Which kernel takes an attention problem, and the memory it works in.
#include <algorithm>
#include <atomic>
#include <bit>

#include "decode.h"
#include "kernels.h"
#include "prepare.h"
#include "tuned.h"

namespace tq::cuda {

// 10 ms. Other work that holds multiprocessors is gone by then; two decode kernels that hold each
// other's are not. (What a block does alone it adds up in another order: other last bits.)
std::atomic<int64_t> patience = 20'000'000;

namespace {

int round_up(int64_t n, int to) { return static_cast<int>((n + to - 1) / to); }

// The decode kernels of this library that are not empty on the current device (decode_block.cuh).
enum class Kind { none, portable, bulk };

Kind device_kind() {
  const int version = compiled_for();
  return version >= 90 && version < 120 ? Kind::bulk : version >= 80 ? Kind::portable : Kind::none;
}

// Blocks of the portable kernels that run at once on a multiprocessor; a KB of each is the
// system's.
int portable_blocks() {
  int device = 0, bytes = 0;
  if (cudaGetDevice(&device) == cudaSuccess)
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  return std::max(1, bytes / (kPortableLimit + 1024));
}

// How the work is cut. Items that are equally long are dealt out evenly wherever that leaves few
// multiprocessors idle, else they lie on a line.
DecodePlan plan_decode(const AttentionProblem& p, int multiprocessors) {
  // 128 of an H200's 132 draw the memory's full rate. D 512 is bound by look-ups, and wants them
  // all.
  DecodePlan plan = {};
  plan.portable = device_kind() == Kind::portable;
  const int most = plan.portable ? multiprocessors * portable_blocks()
                   : p.D > 256   ? multiprocessors
                                 : multiprocessors - multiprocessors / 32;
  const int64_t rows = p.Hq / p.Hkv * p.Lq;
  const int most_rows = plan.portable ? 8 : p.D <= 128 ? 32 : p.D <= 256 ? 16 : 8;
  plan.tile_rows = rows <= 8 ? 8 : rows <= 16 && most_rows >= 16 ? 16 : most_rows;
  plan.row_tiles = round_up(rows, plan.tile_rows);
  plan.row_pairs = static_cast<int>(std::min<int64_t>(rows + 1, plan.tile_rows) / 2);
  plan.items = static_cast<int>(p.B * p.Hkv * plan.row_tiles);

  plan.blocks_per_item = most >= plan.items ? most / plan.items : 1;
  plan.items_per_block = round_up(plan.items, most);
  plan.blocks = plan.items_per_block > 1 ? round_up(plan.items, plan.items_per_block)
                                         : plan.items * plan.blocks_per_item;
  if (plan.blocks_per_item > 1) plan.partial_slots = plan.blocks, plan.result_slots = plan.items;
  const bool equal = p.B == 1 || ((!p.kv_len || p.kv_len.stride[0] == 0) &&
                                  (!p.kv_start || p.kv_start.stride[0] == 0));
  if (!equal || 10 * plan.blocks < 9 * most) {
    plan.blocks_per_item = plan.items_per_block = 0;
    plan.blocks = most;
    plan.partial_slots = 2 * plan.blocks;
    plan.result_slots = plan.blocks;
  }

  // A block with less than a unit for each of its warps costs more in the exchange than it
  // brings. But the rotation of a long vector is itself worth the company: D · D numbers.
  const unsigned min_units = plan.portable ? portable_warps(static_cast<int>(p.D))
                             : p.D <= 128  ? 16
                                           : 1;
  plan.min_units_log2 = std::bit_width(min_units) - 1;
  plan.min_span = p.D <= 128 ? 1 : static_cast<uint32_t>(p.D) / 8;
  return plan;
}

// The tuned kernels read packed rows, and bf16 norms, that follow each other, 16 bytes at a time,
// and queries 8 bytes at a time.
bool is_decode(const AttentionProblem& p) {
  const int64_t (&step)[4] = p.query.stride;
  const bool query = p.query.dtype != Dtype::f32 && step[3] == 1 &&
                     (step[0] | step[1] | step[2]) % 4 == 0 &&
                     reinterpret_cast<uintptr_t>(p.query.data) % 8 == 0;
  const auto streams = [&](const View& packed, const View& norms) {
    return packed.stride[3] == 1 && (packed.stride[2] == p.D / 2 || p.Lkv <= 1) &&
           packed.stride[1] % 16 == 0 && packed.stride[0] % 16 == 0 &&
           packed.stride[0] < int64_t{UINT32_MAX} * 16 &&
           reinterpret_cast<uintptr_t>(packed.data) % 16 == 0 && norms.dtype == Dtype::bf16 &&
           (norms.stride[2] == 1 || p.Lkv <= 1) && norms.stride[1] % 8 == 0 &&
           norms.stride[0] % 8 == 0 && reinterpret_cast<uintptr_t>(norms.data) % 16 == 0;
  };
  return tuned_dim(p.D) && device_kind() != Kind::none && query && streams(p.k_packed, p.k_norms) &&
         streams(p.v_packed, p.v_norms) && reinterpret_cast<uintptr_t>(p.rotation) % 16 == 0 &&
         p.Lkv < (int64_t{1} << 30) && p.B * p.Hkv * p.Lkv / 32 + p.B * p.Hq * p.Lq < INT32_MAX / 4;
}

// The parts of a decode workspace, each aligned to 16 bytes.
int64_t lay_out(DecodeTask* task, char* memory) {
  const AttentionProblem& p = task->problem;
  const DecodePlan& plan = task->plan;
  const int64_t rows = static_cast<int64_t>(plan.items) * plan.tile_rows;
  int64_t size = 0;
  const auto take = [&](int64_t bytes) {
    char* const part = memory + size;
    size += (bytes + 15) / 16 * 16;
    return part;
  };
  task->q = reinterpret_cast<__half*>(
      take(rows * query_stride(static_cast<int>(p.D)) * int64_t{sizeof(__half)}));
  task->partials = reinterpret_cast<float4*>(take(exchange_words(*task) * int64_t{sizeof(float4)}));
  task->results = task->partials + static_cast<int64_t>(plan.partial_slots) *
                                       partial_words(static_cast<int>(p.D), plan.row_pairs);
  return size;
}

Source source_of(const View& v, int size) {
  return {static_cast<const char*>(v.data), static_cast<uint32_t>(v.stride[0] * size / 16),
          static_cast<uint32_t>(v.stride[1] * size / 16)};
}

DecodeTask make_task(const AttentionProblem& p, int multiprocessors) {
  DecodeTask task = {};
  task.problem = p;
  task.plan = plan_decode(p, multiprocessors);
  task.k = source_of(p.k_packed, 1), task.v = source_of(p.v_packed, 1);
  task.k_norms = source_of(p.k_norms, 2), task.v_norms = source_of(p.v_norms, 2);
  task.group = static_cast<int>(p.Hq / p.Hkv);
  task.patience = patience;
  return task;
}

bool is_empty(const AttentionProblem& p) { return p.B * p.Hq * p.Lq == 0; }

}  // namespace

int64_t attention_workspace(const AttentionProblem& p, int multiprocessors) {
  if (is_empty(p)) return 0;
  if (is_prefill(p)) return prefill_workspace(p, multiprocessors);
  if (!is_decode(p)) return general_workspace(p, multiprocessors);
  DecodeTask task = make_task(p, multiprocessors);
  return lay_out(&task, nullptr);
}

cudaError_t launch_attention(const AttentionProblem& p, void* workspace, int multiprocessors,
                             cudaStream_t stream) {
  if (is_empty(p)) return cudaSuccess;
  if (is_prefill(p)) return launch_prefill(p, workspace, multiprocessors, stream);
  if (!is_decode(p)) return launch_general(p, workspace, multiprocessors, stream);
  DecodeTask task = make_task(p, multiprocessors);
  lay_out(&task, static_cast<char*>(workspace));
  if (const cudaError_t error = launch_rotate_query(task, stream); error != cudaSuccess)
    return error;
  return for_tuned_dim(p.D, [&](auto dim) { return launch_decode<dim>(task, stream); });
}

}  // namespace tq::cuda
