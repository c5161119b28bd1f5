#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace tq::cpu {

// The instruction sets that this processor runs, the best one last.
const std::vector<const Kernels*>& available();

// Use another one from now on, in all threads. For tests.
void use(const std::string& isa);

}  // namespace tq::cpu
