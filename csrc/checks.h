// From the user's tensors to validated problems (problem.h): the only input checks in C++, shared
// by all devices. `turboquant/_checks.py` says the same for the fake kernels, in the same words.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "problem.h"

namespace tq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A problem, and the tensors its pointers reach into beyond the caller's own: converted constants
// and the outputs, which are allocated here because their shapes do not depend on the device.
template <class Problem>
struct Checked {
  Problem problem;
  std::vector<Tensor> outputs;
  std::vector<Tensor> owned;
};

struct CheckedUpdate {
  CompressProblem k, v;
  std::vector<Tensor> owned;
};

Checked<CompressProblem> check_compress(const Tensor& x, const Tensor& rotation,
                                        const Tensor& boundaries, const OptionalTensor& centroids,
                                        const std::string& norm, const OptionalTensor& offset);

Checked<DecompressProblem> check_decompress(const Tensor& packed, const Tensor& norms,
                                            const Tensor& centroids, const Tensor& rotation,
                                            const OptionalTensor& offset,
                                            std::optional<ScalarType> dtype);

CheckedUpdate check_update(const Tensor& k, const Tensor& v, const Tensor& input_pos,
                           const Tensor& rotation, const Tensor& boundaries, const Tensor& k_packed,
                           const Tensor& k_norms, const Tensor& v_packed, const Tensor& v_norms,
                           const OptionalTensor& centroids, const std::string& k_norm,
                           const std::string& v_norm, const OptionalTensor& k_offset);

// outputs: out, and lse if `with_lse`.
Checked<AttentionProblem> check_attention(
    const char* op, const Tensor& query, const Tensor& k_packed, const Tensor& k_norms,
    const Tensor& v_packed, const Tensor& v_norms, const Tensor& centroids, const Tensor& rotation,
    const OptionalTensor& attn_mask, bool is_causal, std::optional<double> scale,
    const OptionalTensor& kv_len, bool mask_is_causal, const OptionalTensor& kv_start,
    std::optional<double> softcap, const OptionalTensor& sinks, bool with_lse);

}  // namespace tq
