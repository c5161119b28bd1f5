#pragma once

#include <string>
#include <vector>

#include "amx.h"
#include "kernels.h"

namespace tq::cpu {

// The instruction sets that this processor runs, the best one last.
const std::vector<const Kernels*>& available();

// Use another one from now on, in all threads. For tests.
void use(const std::string& isa);

// Whether attention of bf16 queries may go to the processor's matrix units (AMX): from the start,
// if it has them. Tests force it.
bool amx_enabled();
void enable_amx(bool enabled);

// Attention on them, where it is enabled and they are there; else null.
Attend amx();

}  // namespace tq::cpu
