// One call of torch's attention per batch row, over its decompressed keys and values: taken where
// that one call computes the whole result, because merging several would round each to bf16 and
// lose to torch in accuracy. That is a prompt from its first token on, or rows that all see all.
//
// Cost per key: D multiply-adds per coordinate to decompress, shared by all query rows.
#include "prefill.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <optional>

#include "buffer.h"
#include "codec.h"
#include "dispatch.h"
#include "kernels.h"

namespace tq::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kWorkspace = 16 << 20;  // numbers of decompressed K, and of V: 32 MiB each

// What one batch row's queries see: query rows [row, Lq) the keys [key, key + keys), the causal
// rule among themselves. Rows before see nothing.
struct Seen {
  int64_t row, key, keys;
};

Seen seen(const AttentionProblem& p, int64_t b) {
  const int64_t length = p.length(b), start = std::min(p.start(b), length);
  const int64_t first_token = length - p.Lq;  // position of query row 0
  const int64_t row = p.causal ? std::min(p.Lq, std::max<int64_t>(0, start - first_token)) : 0;
  return {row, start, length - start};
}

Tensor tensor_at(const View& v, int64_t b, int64_t heads, int64_t row, int64_t rows, int64_t D) {
  return torch::stable::from_blob(
      row_pointer(v, 2, b, 0, row), {1, heads, rows, D}, {0, v.stride[1], v.stride[2], 1},
      torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::BFloat16);
}

// Keys or values [s.key, s.key + s.keys) of batch row b: bf16 [1, Hkv, keys, D].
Tensor decompressed(const AttentionProblem& p, const View& packed, const View& norms, int64_t b,
                    const Seen& s) {
  const std::array<int64_t, 4> sizes = {1, p.Hkv, s.keys, p.D};
  const Tensor x = torch::stable::empty({sizes.data(), sizes.size()}, ScalarType::BFloat16);
  DecompressProblem problem = {};
  problem.B = 1, problem.H = p.Hkv, problem.S = s.keys, problem.D = p.D;
  problem.packed = packed;
  problem.packed.data = byte_row(packed, b, 0, s.key);
  problem.norms = norms;
  problem.norms.data = row_pointer(norms, size_of(norms.dtype), b, 0, s.key);
  problem.x = {x.data_ptr(), Dtype::bf16, {0, s.keys * p.D, p.D, 1}};
  problem.rotation = p.rotation;
  problem.centroids = p.centroids;
  decompress(problem);
  return x;
}

void attend(const AttentionProblem& p, int64_t b, const Seen& s) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const int64_t rows = p.Lq - s.row;
  // query, key, value, dropout_p, is_causal, attn_mask, scale
  std::array<StableIValue, 7> stack = {from(tensor_at(p.query, b, p.Hq, s.row, rows, p.D)),
                                       from(decompressed(p, p.k_packed, p.k_norms, b, s)),
                                       from(decompressed(p, p.v_packed, p.v_norms, b, s)),
                                       from(0.0),
                                       from(p.causal),
                                       from(std::optional<Tensor>()),
                                       from(std::optional<double>(p.scale))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::_scaled_dot_product_flash_attention_for_cpu",
                                               "", stack.data(), TORCH_ABI_VERSION));
  const Tensor result = to<Tensor>(stack[0]), result_lse = to<Tensor>(stack[1]);
  Tensor out = tensor_at(p.out, b, p.Hq, s.row, rows, p.D);
  torch::stable::copy_(out, result);
  if (!p.lse) return;
  const auto* lse = static_cast<const float*>(result_lse.data_ptr());
  const auto stride = result_lse.strides();
  for (int64_t h = 0; h < p.Hq; ++h)
    for (int64_t i = 0; i < rows; ++i)
      p.lse[(b * p.Hq + h) * p.Lq + s.row + i] = lse[h * stride[1] + i * stride[2]];
}

void clear(const AttentionProblem& p, int64_t b, int64_t rows) {
  for (int64_t h = 0; h < p.Hq; ++h) {
    for (int64_t i = 0; i < rows; ++i) {
      std::memset(row_pointer(p.out, 2, b, h, i), 0, p.D * 2);
      if (p.lse) p.lse[(b * p.Hq + h) * p.Lq + i] = -INFINITY;
    }
  }
}

}  // namespace

bool prefill_applies(const AttentionProblem& p) {
  // Below 2·D rows per key decompression costs more than the matrix units save.
  if (!amx_enabled() || p.query.dtype != Dtype::bf16 || p.query.stride[3] != 1 ||
      p.out.stride[3] != 1 || p.mask || p.sinks || p.softcap != 0 ||
      p.Lq * (p.Hq / p.Hkv) < 2 * p.D)
    return false;
  for (int64_t b = 0; b < p.B; ++b) {
    const Seen s = seen(p, b);
    const bool whole_prompt = s.keys <= p.Lq - s.row;
    if ((p.causal && !whole_prompt) || p.Hkv * s.keys * p.D > kWorkspace) return false;
  }
  return true;
}

void prefill(const AttentionProblem& p) {
  for (int64_t b = 0; b < p.B; ++b) {
    const Seen s = seen(p, b);
    const int64_t unseeing = s.keys == 0 ? p.Lq : s.row;
    clear(p, b, unseeing);
    if (unseeing < p.Lq) attend(p, b, s);
  }
}

}  // namespace tq::cpu
