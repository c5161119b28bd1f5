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
  }
  ~OnDevice() { cudaSetDevice(previous_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  cudaStream_t stream() const { return stream_; }

  static void check(cudaError_t error, const char* op = "turboquant") {
    if (error != cudaSuccess)
      throw std::runtime_error(std::string(op) + ": CUDA error: " + cudaGetErrorString(error));
  }

 private:
  int previous_ = 0;
  cudaStream_t stream_ = nullptr;
};

std::tuple<Tensor, Tensor> compress_op(const Tensor& x, const Tensor& rotation,
                                       const Tensor& boundaries, const OptionalTensor& centroids,
                                       const std::string& norm, const OptionalTensor& offset) {
  const auto checked = check_compress(x, rotation, boundaries, centroids, norm, offset);
  const OnDevice device(x);
  device.check(launch_compress(checked.problem, device.stream()), "compress");
  return {checked.outputs[0], checked.outputs[1]};
}

Tensor decompress_op(const Tensor& packed, const Tensor& norms, const Tensor& centroids,
                     const Tensor& rotation, const OptionalTensor& offset,
                     std::optional<ScalarType> dtype) {
  const auto checked = check_decompress(packed, norms, centroids, rotation, offset, dtype);
  const OnDevice device(packed);
  device.check(launch_decompress(checked.problem, device.stream()), "decompress");
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
  device.check(launch_compress(checked.k, device.stream()), "update_");
  device.check(launch_compress(checked.v, device.stream()), "update_");
}

}  // namespace
}  // namespace tq::cuda

STABLE_TORCH_LIBRARY_IMPL(turboquant, CUDA, m) {
  m.impl("compress", TORCH_BOX(&tq::cuda::compress_op));
  m.impl("decompress", TORCH_BOX(&tq::cuda::decompress_op));
  m.impl("update_", TORCH_BOX(&tq::cuda::update_op));
}
