// Fake: the pipeline primitives (cp.async).
#pragma once
#include "cuda_runtime.h"
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  if (bytes != 4 && bytes != 8 && bytes != 16) emu::error("__pipeline_memcpy_async of %zu bytes", bytes);
  emu::copy_async(emu::shared_offset(to), from, static_cast<int>(bytes), static_cast<int>(zeros));
}
inline void __pipeline_commit() { emu::copies_commit(); }
inline void __pipeline_wait_prior(size_t n) { emu::copies_wait(static_cast<int>(n)); }
