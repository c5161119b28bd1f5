// Registers the CUDA implementations of the ops: check, guard, launch. The only CUDA file that
// knows torch.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "../checks.h"
#include "kernels.h"

namespace tq::cuda {
namespace {

// Makes the tensor's device current while an op runs, and knows the stream to run on.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& t) {
    check(cudaGetDevice(&previous_));
    const int device = t.get_device_index();
    if (device != previous_) check(cudaSetDevice(device));
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    device_ = device;
    check(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, device));
  }
  ~OnDevice() { cudaSetDevice(previous_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaStream_t stream() const { return stream_; }
  int multiprocessors() const { return multiprocessors_; }

  // Memory from torch's allocator: it may be reused on this stream as soon as the tensor is gone.
  Tensor workspace(int64_t bytes) const {
    const int64_t stride = 1;
    AtenTensorHandle memory = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(1, &bytes, &stride, aoti_torch_dtype_uint8(),
                                                    aoti_torch_device_type_cuda(), device_,
                                                    &memory));
    return Tensor(memory);
  }

  static void check(cudaError_t error, const char* op = "turboquant") {
    if (error != cudaSuccess)
      throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(error));
  }

 private:
  int previous_ = 0, device_ = 0, multiprocessors_ = 0;
  cudaStream_t stream_ = nullptr;
};

std::tuple<Tensor, Tensor> compress_op(const Tensor& x, const Tensor& rotation,
                                       const Tensor& boundaries, const OptionalTensor& centroids,
                                       const std::string& norm, const OptionalTensor& offset) {
  const auto checked = check_compress(x, rotation, boundaries, centroids, norm, offset);
  const OnDevice device(x);
  const Tensor workspace = device.workspace(compress_workspace(&checked.problem, 1));
  device.check(launch_compress(&checked.problem, 1, workspace.data_ptr(), device.stream()),
               "compress");
  return {checked.outputs[0], checked.outputs[1]};
}

Tensor decompress_op(const Tensor& packed, const Tensor& norms, const Tensor& centroids,
                     const Tensor& rotation, const OptionalTensor& offset,
                     std::optional<ScalarType> dtype) {
  const auto checked = check_decompress(packed, norms, centroids, rotation, offset, dtype);
  const OnDevice device(packed);
  const Tensor workspace = device.workspace(decompress_workspace(checked.problem));
  device.check(launch_decompress(checked.problem, workspace.data_ptr(), device.stream()),
               "decompress");
  const Tensor& x = checked.outputs[0];
  return dtype == ScalarType::Double ? torch::stable::to(x, ScalarType::Double) : x;
}

void update_op(const Tensor& k, const Tensor& v, const Tensor& input_pos, const Tensor& rotation,
               const Tensor& boundaries, Tensor k_packed, Tensor k_norms, Tensor v_packed,
               Tensor v_norms, const OptionalTensor& centroids, const std::string& k_norm,
               const std::string& v_norm, const OptionalTensor& k_offset) {
  const auto checked = check_update(k, v, input_pos, rotation, boundaries, k_packed, k_norms,
                                    v_packed, v_norms, centroids, k_norm, v_norm, k_offset);
  const OnDevice device(k);
  const CompressProblem problems[] = {checked.k, checked.v};
  const Tensor workspace = device.workspace(compress_workspace(problems, 2));
  device.check(launch_compress(problems, 2, workspace.data_ptr(), device.stream()), "update_");
}

void run_attention(const AttentionProblem& problem, const Tensor& query, const char* op) {
  const OnDevice device(query);
  const int64_t bytes = attention_workspace(problem, device.multiprocessors());
  const Tensor workspace = device.workspace(bytes);
  device.check(
      launch_attention(problem, workspace.data_ptr(), device.multiprocessors(), device.stream()),
      op);
}

Tensor sdpa_op(const Tensor& query, const Tensor& k_packed, const Tensor& k_norms,
               const Tensor& v_packed, const Tensor& v_norms, const Tensor& centroids,
               const Tensor& rotation, const OptionalTensor& attn_mask, bool is_causal,
               std::optional<double> scale, const OptionalTensor& kv_len, bool mask_is_causal) {
  const auto checked = check_attention(
      "tq4_sdpa", query, k_packed, k_norms, v_packed, v_norms, centroids, rotation, attn_mask,
      is_causal, scale, kv_len, mask_is_causal, std::nullopt, std::nullopt, std::nullopt, false);
  run_attention(checked.problem, query, "tq4_sdpa");
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
  run_attention(checked.problem, query, "tq4_attention");
  return {checked.outputs[0], checked.outputs[1]};
}

int64_t patience_op(std::optional<int64_t> use) {
  if (use) patience = *use;
  return patience;
}

int64_t prefill_images_op(std::optional<int64_t> use) {
  if (use) prefill_images = *use;
  return prefill_images;
}

}  // namespace
}  // namespace tq::cuda

// Private, for tests.
STABLE_TORCH_LIBRARY_FRAGMENT(turboquant, m) {
  m.def("_cuda_patience(int? use=None) -> int");
  m.def("_cuda_prefill_images(int? use=None) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(turboquant, CompositeExplicitAutograd, m) {
  m.impl("_cuda_patience", TORCH_BOX(&tq::cuda::patience_op));
  m.impl("_cuda_prefill_images", TORCH_BOX(&tq::cuda::prefill_images_op));
}

STABLE_TORCH_LIBRARY_IMPL(turboquant, CUDA, m) {
  m.impl("compress", TORCH_BOX(&tq::cuda::compress_op));
  m.impl("decompress", TORCH_BOX(&tq::cuda::decompress_op));
  m.impl("update_", TORCH_BOX(&tq::cuda::update_op));
  m.impl("tq4_sdpa", TORCH_BOX(&tq::cuda::sdpa_op));
  m.impl("tq4_attention", TORCH_BOX(&tq::cuda::attention_op));
}
