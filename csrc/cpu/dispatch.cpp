// Which instruction set the CPU kernels use: the best that this processor runs.
#include "dispatch.h"

#include <atomic>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

// The tile registers are so large that Linux keeps them for processes that ask.
bool amx_usable() {
#if defined(__x86_64__) && defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
  return available().back() == avx512_kernels() && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_amx() {
  static const bool usable = amx_usable();
  return usable;
}

std::atomic<bool>& amx_flag() {
  static std::atomic<bool> flag = has_amx();
  return flag;
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

bool amx_enabled() { return amx_flag(); }
void enable_amx(bool enabled) { amx_flag() = enabled; }

Attend amx() { return amx_enabled() && has_amx() ? amx_attend() : nullptr; }

}  // namespace tq::cpu
