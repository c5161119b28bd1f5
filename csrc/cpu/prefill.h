// Attention of many query rows in bf16 on processors with AMX: torch's own, over decompressed keys
// and values. Its tiles are full of queries; those of amx.cpp hold each query in two parts.
#pragma once

#include "../problem.h"

namespace tq::cpu {

// Whether torch's attention is the faster way for this problem, and can express it.
bool prefill_applies(const AttentionProblem& problem);
void prefill(const AttentionProblem& problem);

}  // namespace tq::cpu
