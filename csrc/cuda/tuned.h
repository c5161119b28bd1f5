// The head dims that have kernels of their own; all others run general ones.
#pragma once

#include <cstdint>
#include <type_traits>

namespace tq::cuda {

constexpr bool tuned_dim(int64_t D) {
  return D == 64 || D == 80 || D == 96 || D == 128 || D == 192 || D == 256 || D == 512;
}

// f(D), with D a constant of its type. For tuned dims only.
template <class F>
auto for_tuned_dim(int64_t D, F f) {
  switch (D) {
    case 64: return f(std::integral_constant<int, 64>());
    case 80: return f(std::integral_constant<int, 80>());
    case 96: return f(std::integral_constant<int, 96>());
    case 128: return f(std::integral_constant<int, 128>());
    case 192: return f(std::integral_constant<int, 192>());
    case 256: return f(std::integral_constant<int, 256>());
    default: return f(std::integral_constant<int, 512>());
  }
}

}  // namespace tq::cuda
