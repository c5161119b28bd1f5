// Core of the CUDA emulator: fibers, warp rendezvous, block barriers, shared memory windows.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

struct uint3 { unsigned x, y, z; };
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};
using cudaStream_t = struct CUstream_st*;

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace emu {

// ---- options (environment EMU_*, or set from a test)
struct Options {
  int multiprocessors = 4;   // EMU_SMS
  int order = -1;            // EMU_ORDER: fifo, random, warps, lanes, blocks, any (default: drawn per launch)
  int copies = -1;           // EMU_COPIES: now, random, late, any
  uint64_t seed = 1;         // EMU_SEED
  int per_sm = 0;            // EMU_PER_SM: resident blocks per multiprocessor, 0: from threads and smem
  int timeout = 300;         // EMU_TIMEOUT seconds a launch
  int barrier_check = 1;     // EMU_BARRIER_CHECK: threads that meet at one __syncthreads must come from one place
  long clock = 0;            // EMU_CLOCK: clock64() goes on by so much with each switch of fibers
  int resident = 0;          // EMU_RESIDENT: blocks that run at once, at most
  int verbose = 0;           // EMU_VERBOSE
};
extern Options options;
extern long errors;          // reported so far (alignment, accounting, ...): a test should fail if > 0
void set_seed(uint64_t seed);

// ---- what device code calls
[[noreturn]] void fatal(const char* format, ...);
void error(const char* format, ...);  // reports with block, thread and place; counts
void warning(const char* format, ...);  // once a place; does not count

// Lanes meet. `finish` runs once, when all live lanes of `mask` are there, with each lane's argument.
struct Meeting {
  uint32_t mask, arrived;
  void* arg[32];
};
void meet(uint32_t mask, void (*finish)(Meeting&), void* arg, const char* what);
void block_barrier(int id, int count, const char* what);  // count 0: all threads that are alive
int block_vote(int value, int op);                        // 0 count, 1 and, 2 or
void poll();                                              // the caller looks at memory others write
void maybe_poll();                                        // now and then
void touch();                                             // something others may see has changed
int lane();
uint32_t active_lanes();
uint64_t ticks();

void* dynamic_shared(size_t alignment);
void* static_shared(const char* function, int site, size_t size, size_t alignment);
template <class T>
T& shared(const char* function, int site, size_t alignment = 0) {
  return *static_cast<T*>(static_shared(function, site, sizeof(T), alignment > alignof(T) ? alignment : alignof(T)));
}
uint32_t shared_offset(const void* p);
void* shared_pointer(uint32_t offset);

void mma_f16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void mma_tf32(float (&c)[4], const float (&a)[4], float b0, float b1);
void mma_bf16_k8(float (&c)[4], uint32_t low, uint32_t high, uint32_t b);
void load_matrices(uint32_t (&x)[4], uint32_t row, bool transposed);
uint32_t transpose8x8(uint32_t x);
void mbarrier_init(uint32_t barrier, uint32_t arrivals);
void mbarrier_arrive(uint32_t barrier, uint32_t arrivals, uint32_t expect_bytes);
void mbarrier_expect_only(uint32_t barrier, uint32_t expect_bytes);
bool mbarrier_test(uint32_t barrier, uint32_t parity);
void mbarrier_wait(uint32_t barrier, uint32_t parity);
void copy_bulk(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier);
void copy_async(uint32_t to, const void* from, int bytes, int zeros = 0);
void copies_commit();
void copies_wait(int pending);

// ---- launching
struct Launch {
  dim3 grid, block;
  size_t smem;
  bool cooperative = false;
  void run(const void* kernel, void (*body)(void*), void* context, const char* name);
  template <class... P, class... A>
  void operator()(void (*kernel)(P...), A&&... a) {
    std::tuple<std::decay_t<P>...> parameters(static_cast<A&&>(a)...);
    auto body = [&] { std::apply(kernel, parameters); };
    run(reinterpret_cast<const void*>(kernel),
        [](void* f) { (*static_cast<decltype(body)*>(f))(); }, &body, __PRETTY_FUNCTION__);
  }
};
inline Launch launch(dim3 grid, dim3 block, size_t smem = 0, cudaStream_t = nullptr) {
  return {grid, block, smem};
}

std::string largest_kernel();  // name of the launch with the most shared memory since the last call

// ---- for tests: memory that ends (up to `alignment`) at an unmapped page
void* guarded(size_t bytes, size_t alignment = 16);
void release(void* p);
void protect(void* p, bool read_only);  // a kernel that writes there faults

}  // namespace emu
