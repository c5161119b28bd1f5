// Attention of many query rows in bf16 on processors with AMX, whose matrix units only torch's own
// attention reaches.
#pragma once

#include "../problem.h"

namespace tq::cpu {

// Whether torch's attention is the faster way for this problem, and can express it.
bool prefill_applies(const AttentionProblem& problem);
void prefill(const AttentionProblem& problem);

// Whether prefill() may be used at all: from the start, if the processor has AMX. Tests force it.
bool prefill_enabled();
void enable_prefill(bool enabled);

}  // namespace tq::cpu
