// Which instruction set the CPU kernels use: the best that this processor runs.
#include "dispatch.h"

#include <atomic>
#include <stdexcept>

namespace tq::cpu {
namespace {

std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> sets = {scalar_kernels()};
#ifdef __x86_64__
  __builtin_cpu_init();
  if (avx2_kernels() && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    sets.push_back(avx2_kernels());
  if (avx512_kernels() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    sets.push_back(avx512_kernels());
#endif
  if (neon_kernels()) sets.push_back(neon_kernels());
  return sets;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> set = available().back();
  return set;
}

}  // namespace

const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> sets = usable();
  return sets;
}

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

void use(const std::string& isa) {
  for (const Kernels* set : available())
    if (isa == set->isa) {
      chosen() = set;
      return;
    }
  throw std::runtime_error("_cpu_isa: this processor does not run " + isa);
}

}  // namespace tq::cpu
