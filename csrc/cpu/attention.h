// tq4_sdpa and tq4_attention on the CPU.
#pragma once

#include "../problem.h"

namespace tq::cpu {

void attention(const AttentionProblem& problem);

}  // namespace tq::cpu
