// Registers the CPU implementations of the ops.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>
#include <tuple>

#include "../checks.h"
#include "attention.h"
#include "codec.h"
#include "dispatch.h"

namespace tq::cpu {
namespace {

std::tuple<Tensor, Tensor> compress_op(const Tensor& x, const Tensor& rotation,
                                       const Tensor& boundaries, const OptionalTensor& centroids,
                                       const std::string& norm, const OptionalTensor& offset) {
  const auto checked = check_compress(x, rotation, boundaries, centroids, norm, offset);
  compress({&checked.problem});
  return {checked.outputs[0], checked.outputs[1]};
}

Tensor decompress_op(const Tensor& packed, const Tensor& norms, const Tensor& centroids,
                     const Tensor& rotation, const OptionalTensor& offset,
                     std::optional<ScalarType> dtype) {
  const auto checked = check_decompress(packed, norms, centroids, rotation, offset, dtype);
  decompress(checked.problem);
  const Tensor& x = checked.outputs[0];
  return dtype == ScalarType::Double ? torch::stable::to(x, ScalarType::Double) : x;
}

void update_op(const Tensor& k, const Tensor& v, const Tensor& input_pos, const Tensor& rotation,
               const Tensor& boundaries, Tensor k_packed, Tensor k_norms, Tensor v_packed,
               Tensor v_norms, const OptionalTensor& centroids, const std::string& k_norm,
               const std::string& v_norm, const OptionalTensor& k_offset) {
  const auto checked = check_update(k, v, input_pos, rotation, boundaries, k_packed, k_norms,
                                    v_packed, v_norms, centroids, k_norm, v_norm, k_offset);
  const CompressProblem& p = checked.k;
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t t = 0; t < p.S; ++t)
      if (p.slot.at(b, t) >= p.capacity)
        throw std::runtime_error("update_: input_pos must be below the capacity " +
                                 std::to_string(p.capacity) + ", got " +
                                 std::to_string(p.slot.at(b, t)) + "; nothing was written");
  compress({&checked.k, &checked.v});
}

Tensor sdpa_op(const Tensor& query, const Tensor& k_packed, const Tensor& k_norms,
               const Tensor& v_packed, const Tensor& v_norms, const Tensor& centroids,
               const Tensor& rotation, const OptionalTensor& attn_mask, bool is_causal,
               std::optional<double> scale, const OptionalTensor& kv_len, bool mask_is_causal) {
  const auto checked = check_attention(
      "tq4_sdpa", query, k_packed, k_norms, v_packed, v_norms, centroids, rotation, attn_mask,
      is_causal, scale, kv_len, mask_is_causal, std::nullopt, std::nullopt, std::nullopt, false);
  attention(checked.problem);
  return checked.outputs[0];
}

std::tuple<Tensor, Tensor> attention_op(
    const Tensor& query, const Tensor& k_packed, const Tensor& k_norms, const Tensor& v_packed,
    const Tensor& v_norms, const Tensor& centroids, const Tensor& rotation,
    const OptionalTensor& attn_mask, bool is_causal, std::optional<double> scale,
    const OptionalTensor& kv_len, bool mask_is_causal, const OptionalTensor& kv_start,
    std::optional<double> softcap, const OptionalTensor& sinks) {
  const auto checked = check_attention("tq4_attention", query, k_packed, k_norms, v_packed, v_norms,
                                       centroids, rotation, attn_mask, is_causal, scale, kv_len,
                                       mask_is_causal, kv_start, softcap, sinks, true);
  attention(checked.problem);
  return {checked.outputs[0], checked.outputs[1]};
}

std::string cpu_isas() {
  std::string names;
  for (const Kernels* set : available())
    names += (names.empty() ? "" : " ") + std::string(set->isa);
  return names;
}

std::string cpu_isa(const std::optional<std::string>& isa) {
  if (isa) use(*isa);
  return kernels().isa;
}

bool cpu_amx(std::optional<bool> use) {
  if (use) enable_amx(*use);
  return amx_enabled();
}

}  // namespace
}  // namespace tq::cpu

STABLE_TORCH_LIBRARY_IMPL(turboquant, CPU, m) {
  m.impl("compress", TORCH_BOX(&tq::cpu::compress_op));
  m.impl("decompress", TORCH_BOX(&tq::cpu::decompress_op));
  m.impl("update_", TORCH_BOX(&tq::cpu::update_op));
  m.impl("tq4_sdpa", TORCH_BOX(&tq::cpu::sdpa_op));
  m.impl("tq4_attention", TORCH_BOX(&tq::cpu::attention_op));
}

// Without tensor arguments there is no device to dispatch on.
STABLE_TORCH_LIBRARY_IMPL(turboquant, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isas", TORCH_BOX(&tq::cpu::cpu_isas));
  m.impl("_cpu_isa", TORCH_BOX(&tq::cpu::cpu_isa));
  m.impl("_cpu_amx", TORCH_BOX(&tq::cpu::cpu_amx));
}
