// Reading and writing single numbers of a run-time dtype, through a View.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../problem.h"

namespace tq::cuda {

__device__ inline int64_t offset_of(const View& v, int64_t b, int64_t h, int64_t s) {
  return b * v.stride[0] + h * v.stride[1] + s * v.stride[2];
}

__device__ inline float load_element(const View& v, int64_t at) {
  switch (v.dtype) {
    case Dtype::f32: return static_cast<const float*>(v.data)[at];
    case Dtype::f16: return __half2float(static_cast<const __half*>(v.data)[at]);
    default: return __bfloat162float(static_cast<const __nv_bfloat16*>(v.data)[at]);
  }
}

__device__ inline void store_element(const View& v, int64_t at, float value) {
  switch (v.dtype) {
    case Dtype::f32: static_cast<float*>(v.data)[at] = value; break;
    case Dtype::f16: static_cast<__half*>(v.data)[at] = __float2half(value); break;
    default: static_cast<__nv_bfloat16*>(v.data)[at] = __float2bfloat16(value);
  }
}

}  // namespace tq::cuda
