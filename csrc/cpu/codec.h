// compress, decompress and update_ on the CPU: cutting a problem into tasks for the kernels.
#pragma once

#include <initializer_list>

#include "../problem.h"

namespace tq::cpu {

// Problems of one rotation (keys and values, say). Slots must be below the capacity.
void compress(std::initializer_list<const CompressProblem*> problems);
void decompress(const DecompressProblem& problem);

}  // namespace tq::cpu
