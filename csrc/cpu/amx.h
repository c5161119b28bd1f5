// attend() on the matrix units of x86 (AMX, bf16).
#pragma once

#include "kernels.h"

namespace tq::cpu {

inline constexpr int kAmxRows = 8;    // query rows of a tile, each in two parts
inline constexpr int kAmxDim = 128;   // coordinates expanded at a time
inline constexpr int kAmxBlock = 64;  // keys expanded at a time
inline constexpr int kAmxKeys = 256;  // keys from one step of the softmax to the next

// What Kernels::attend does, for packed bytes of stride 1, with amx_scratch(rows, D) floats of
// scratch. Null where the compiler does not target AMX.
using Attend = void (*)(const AttendTask&);
Attend amx_attend();

constexpr int64_t amx_scratch(int64_t rows, int64_t D) {
  const int64_t sums_and_q = 3 * round_up(D, kAmxDim);  // for each row
  return kAmxBlock * kAmxDim / 2 + 3 * kAmxKeys +
         round_up(rows, kAmxRows) * (sums_and_q + kAmxKeys + 3 * kAmxBlock);
}

}  // namespace tq::cpu
