// What a kernel is asked to do: validated, plain structs without torch, shared by the CPU and CUDA
// kernels. `checks.cpp` makes them from the user's tensors; nothing else checks input.
//
// All strides are in elements.
#pragma once

#include <cstdint>

#include "format.h"

namespace tq {

enum class Dtype : int { f32, f16, bf16 };

// A tensor [B, H, S, n], read or written through its strides. A stride of 0 broadcasts.
struct View {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t stride[4] = {};

  TQ_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
};

// int32 or int64 numbers, one per batch row and possibly per token.
struct Integers {
  const void* data = nullptr;
  bool wide = false;       // int64
  int64_t stride[2] = {};  // batch row, token

  TQ_HOST_DEVICE explicit operator bool() const { return data != nullptr; }
  TQ_HOST_DEVICE int64_t at(int64_t b, int64_t t = 0) const {
    const int64_t i = b * stride[0] + t * stride[1];
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// Vectors x[b, h, s] become packed[b, h, slot] and norms[b, h, slot].
struct CompressProblem {
  int64_t B, H, S, D;
  int64_t capacity;         // number of slots
  Integers slot;            // [B, S]; none: slot = s. Negative: skip. >= capacity: never written
  View x;                   // [B, H, S, D]
  View offset;              // [B, H, 1, D], subtracted from x; or none
  View packed;              // uint8 [B, H, capacity, D/2]
  View norms;               // bf16 or f32 [B, H, capacity, 1]
  const float* rotation;    // [D, D] contiguous
  const float* boundaries;  // [15] ascending
  const float* centroids;   // [16]; null if the policy is l2
  NormPolicy policy;
};

// x[b, h, s] = norms[b, h, s] · rotationᵀ · centroids[packed[b, h, s]] + offset[b, h]
struct DecompressProblem {
  int64_t B, H, S, D;
  View packed;            // uint8 [B, H, S, D/2]
  View norms;             // bf16 or f32 [B, H, S, 1]
  View offset;            // [B, H, 1, D] or none
  View x;                 // [B, H, S, D]
  const float* rotation;  // [D, D] contiguous
  const float* centroids;
};

// Attention of query over a packed cache. Row i of batch row b sees the keys in
// [kv_start[b], min(kv_len[b], causal limit of i)) that the mask allows.
struct AttentionProblem {
  int64_t B, Hq, Hkv, Lq, Lkv, D;
  View query;     // [B, Hq, Lq, D]
  View out;       // like the query
  View k_packed;  // uint8 [B, Hkv, Lkv, D/2]
  View k_norms;   // bf16 or f32 [B, Hkv, Lkv, 1]
  View v_packed;
  View v_norms;
  View mask;              // bool [B, 1, Lq, Lkv] or none
  Integers kv_len;        // [B] or none: Lkv
  Integers kv_start;      // [B] or none: 0
  View sinks;             // [Hq] along stride[1], or none
  const float* rotation;  // [D, D] contiguous
  const float* centroids;
  float* lse;  // [B, Hq, Lq] contiguous, or null
  float scale;
  float softcap;  // 0: off
  bool causal;    // bottom-right: row i sees keys <= kv_len - Lq + i

  TQ_HOST_DEVICE int64_t length(int64_t b) const {
    const int64_t n = kv_len.data ? kv_len.at(b) : Lkv;
    return n < 0 ? 0 : n > Lkv ? Lkv : n;
  }
  TQ_HOST_DEVICE int64_t start(int64_t b) const {
    const int64_t n = kv_start.data ? kv_start.at(b) : 0;
    return n < 0 ? 0 : n;
  }
};

}  // namespace tq
