// Tests of the emulator itself.
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <vector>
#include <string>
#include "device/ptx.cuh"

using namespace tq::cuda;
static int bad = 0;
#define CHECK(x) do { if (!(x)) { printf("FAILED line %d: %s\n", __LINE__, #x); ++bad; } } while (0)
static float rnd() { return static_cast<float>(rand()) / static_cast<float>(RAND_MAX) * 2 - 1; }

__global__ void __launch_bounds__(128) shuffles(int* out) {
  const int lane = threadIdx.x % 32;
  int v = threadIdx.x;
  int sum = v;
  for (int l = 16; l > 0; l /= 2) sum += __shfl_xor_sync(~0u, sum, l);
  out[threadIdx.x] = sum;
  int up = __shfl_up_sync(~0u, v, 3), down = __shfl_down_sync(~0u, v, 5, 8), from = __shfl_sync(~0u, v, lane + 1, 16);
  out[128 + threadIdx.x] = up;
  out[256 + threadIdx.x] = down;
  out[384 + threadIdx.x] = from;
  out[512 + threadIdx.x] = __ballot_sync(~0u, lane % 3 == 0);
  out[640 + threadIdx.x] = __any_sync(~0u, threadIdx.x == 40) + 2 * __all_sync(~0u, threadIdx.x < 64);
  if (lane < 8) out[768 + threadIdx.x] = __reduce_max_sync(0xFFu, v);
  else if (lane >= 16) out[768 + threadIdx.x] = __reduce_max_sync(0xFFFF0000u, -v);
  if (lane == 31) return;  // gone: the others go on
  out[896 + threadIdx.x] = __popc(__ballot_sync(~0u, 1));
  __syncthreads();
}

__global__ void products(const __half* a, const __half* b, float* c, const float* at, const float* bt, float* ct, const __half* x, __half* y) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  auto two = [&](const __half* p, int row, int col, int ld) { return as_bits(__halves2half2(p[row * ld + col], p[row * ld + col + 1])); };
  uint32_t af[4] = {two(a, g, 2 * t, 16), two(a, g + 8, 2 * t, 16), two(a, g, 2 * t + 8, 16), two(a, g + 8, 2 * t + 8, 16)};
  auto col = [&](int r) { return as_bits(__halves2half2(b[r * 8 + g], b[(r + 1) * 8 + g])); };
  float cf[4] = {c[g * 8 + 2 * t], c[g * 8 + 2 * t + 1], c[(g + 8) * 8 + 2 * t], c[(g + 8) * 8 + 2 * t + 1]};
  mma(cf, af, col(2 * t), col(2 * t + 8));
  c[g * 8 + 2 * t] = cf[0], c[g * 8 + 2 * t + 1] = cf[1], c[(g + 8) * 8 + 2 * t] = cf[2], c[(g + 8) * 8 + 2 * t + 1] = cf[3];
  float tf[4] = {at[g * 8 + t], at[(g + 8) * 8 + t], at[g * 8 + t + 4], at[(g + 8) * 8 + t + 4]}, cc[4] = {};
  mma_tf32(cc, tf, bt[t * 8 + g], bt[(t + 4) * 8 + g]);
  ct[g * 8 + 2 * t] = cc[0], ct[g * 8 + 2 * t + 1] = cc[1], ct[(g + 8) * 8 + 2 * t] = cc[2], ct[(g + 8) * 8 + 2 * t + 1] = cc[3];
  const __half2 z = as_half2(transpose8x8(two(x, g, 2 * t, 8)));
  y[g * 8 + 2 * t] = z.x, y[g * 8 + 2 * t + 1] = z.y;
}

// A ring of slots filled by bulk copies, each warp its own.
template <int kSlots>
__global__ void ring(const uint32_t* in, int words, uint64_t* out) {
  extern __shared__ __align__(1024) uint8_t smem[];
  __shared__ uint64_t barriers[4][kSlots], total[4];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t bar = shared_address(barriers[warp]);
  if (lane == 0) for (int i = 0; i < kSlots; ++i) barrier_init(bar + 8 * i, 1);
  barrier_init_fence();
  __syncwarp();
  uint8_t* slots = smem + warp * kSlots * 256;
  const int n = words / 64;
  auto fill = [&](int i) {
    if (i >= n || lane) return;
    barrier_expect(bar + 8 * (i % kSlots), 256);
    copy_bulk(shared_address(slots + i % kSlots * 256), in + 64 * i, 128, bar + 8 * (i % kSlots));
    copy_bulk(shared_address(slots + i % kSlots * 256 + 128), in + 64 * i + 32, 128, bar + 8 * (i % kSlots));
  };
  for (int i = 0; i < kSlots; ++i) fill(i);
  uint64_t sum = 0;
  for (int i = 0; i < n; ++i) {
    barrier_wait(bar + 8 * (i % kSlots), i / kSlots & 1);
    const uint32_t* s = reinterpret_cast<const uint32_t*>(slots + i % kSlots * 256);
    sum += static_cast<uint64_t>(s[lane]) * (i + 1) + s[lane + 32];
    __syncwarp();
    fill(i + kSlots);
  }
  for (int l = 16; l > 0; l /= 2) sum += __shfl_xor_sync(~0u, sum, l);
  if (lane == 0) total[warp] = sum;
  __syncthreads();
  if (threadIdx.x < 4) out[blockIdx.x * 4 + threadIdx.x] = total[threadIdx.x];
}

// cp.async
__global__ void ring_old(const uint32_t* in, int chunks, uint32_t* out) {
  extern __shared__ uint4 buffer[];  // [3][32]
  const int lane = threadIdx.x;
  uint32_t sum = 0;
  auto fill = [&](int i) {
    if (i < chunks) copy16_async(shared_address(&buffer[i % 3 * 32 + lane]), in + (i * 32 + lane) * 4, 16);
    copies_commit();
  };
  fill(0), fill(1);
  for (int i = 0; i < chunks; ++i) {
    copies_wait<1>();
    __syncwarp();
    const uint4 v = buffer[i % 3 * 32 + (lane ^ 1)];
    sum += v.x + v.y + v.z + v.w;
    __syncwarp();
    fill(i + 2);
  }
  out[lane] = sum;
}

// Every block tells every other; polling.
__global__ void exchange(float4* mail, float* out) {
  store_word(&mail[blockIdx.x * blockDim.x + threadIdx.x], make_float4(blockIdx.x + 1, threadIdx.x, 0, 1));
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) {
    float4 v;
    do v = load_word(&mail[b * blockDim.x + threadIdx.x]);
    while (__float_as_uint(v.w) == 0xFFFFFFFFu);
    sum += v.x;
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
__global__ void counter(unsigned* count, int* out) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(count, 1u) == gridDim.x - 1;
  __syncthreads();
  if (last && threadIdx.x == 0) *out = static_cast<int>(blockIdx.x);
  if (threadIdx.x == 0)
    while (atomicAdd(count, 0u) < gridDim.x) {}
}
template <int N> __device__ float* mine() { __shared__ float x[4]; return x; }
__global__ void statics(int* out) {
  float *a = mine<1>(), *b = mine<2>(), *c = mine<1>();
  if (threadIdx.x == 0) out[blockIdx.x] = (a != b) + 2 * (a == c);
}
// Faults that the emulator must find; one a process.
__global__ void trouble(int kind, char* g) {
  extern __shared__ char s[];
  __shared__ uint64_t bar;
  const uint32_t b = shared_address(&bar);
  if (kind == 0 && threadIdx.x < 16) __syncthreads();
  if (kind == 0) __shfl_sync(~0u, 1, 0);
  if (kind == 1) s[1024 + 4096 * 0 + threadIdx.x % 1] = 1;
  if (kind == 2) { if (threadIdx.x == 0) { barrier_init(b, 1); barrier_expect(b, 64); copy_bulk(shared_address(s), g, 48, b); } __syncthreads(); barrier_wait(b, 0); }
  if (kind == 3 && threadIdx.x == 0) { barrier_init(b, 1); barrier_expect(b, 64); copy_bulk(shared_address(s), g + 8, 64, b); }
  if (kind == 4) while (__float_as_uint(load_word(reinterpret_cast<float4*>(g)).x) != 17) {}
  if (kind == 5) reinterpret_cast<volatile uint4*>(s + 4)->x = 1;
  if (kind == 6) barrier_wait(b, 0);
  if (kind == 7 && threadIdx.x == 0) { barrier_init(b, 1); barrier_expect(b, 64); copy_bulk(shared_address(s), g, 64, b); }
  if (kind == 8) s[1000 + threadIdx.x] = 1;
}

int main(int argc, char** argv) {
  using emu::guarded;
  if (argc > 1) {
    char* g = static_cast<char*>(guarded(1024));
    trouble<<<1, 32, 1000>>>(atoi(argv[1]), g);
    printf("errors %ld\n", emu::errors);
    return 0;
  }
  for (int round = 0; round < 20; ++round) {
    {
      int* o = static_cast<int*>(guarded(1024 * 4));
      shuffles<<<1, 128>>>(o);
      for (int i = 0; i < 128; ++i) {
        const int lane = i % 32, base = i - lane;
        CHECK(o[i] == 32 * base + 496);
        CHECK(o[128 + i] == (lane < 3 ? i : i - 3));
        CHECK(o[256 + i] == (lane % 8 + 5 < 8 ? i + 5 : i));
        CHECK(o[384 + i] == base + (lane & 16) + (lane + 1) % 16);
        CHECK(o[512 + i] == 0x49249249);
        CHECK(o[640 + i] == (base == 32) + 2 * (base < 64));
        CHECK(o[768 + i] == (lane < 8 ? base + 7 : lane < 16 ? -1 : -(base + 16)));
        CHECK(o[896 + i] == (lane < 31 ? 31 : -1));
      }
      emu::release(o);
    }
    {
      std::vector<__half> a(256), b(128), x(64), y(64);
      std::vector<float> c(128), c0, at(128), bt(64), ct(128);
      for (auto& v : a) v = __float2half(rnd());
      for (auto& v : b) v = __float2half(rnd());
      for (auto& v : x) v = __float2half(rnd());
      for (auto& v : c) v = rnd();
      for (auto& v : at) v = rnd();
      for (auto& v : bt) v = rnd();
      c0 = c;
      products<<<1, 32>>>(a.data(), b.data(), c.data(), at.data(), bt.data(), ct.data(), x.data(), y.data());
      auto cut = [](float v) { return __uint_as_float(__float_as_uint(v) & 0xFFFFE000u); };
      for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 8; ++j) {
          double s = c0[i * 8 + j], u = 0;
          for (int k = 0; k < 16; ++k) s += static_cast<double>(__half2float(a[i * 16 + k])) * __half2float(b[k * 8 + j]);
          for (int k = 0; k < 8; ++k) u += static_cast<double>(cut(at[i * 8 + k])) * cut(bt[k * 8 + j]);
          CHECK(fabs(s - c[i * 8 + j]) < 1e-5);
          CHECK(fabs(u - ct[i * 8 + j]) < 1e-5);
        }
      for (int i = 0; i < 8; ++i) for (int j = 0; j < 8; ++j) CHECK(y[i * 8 + j].bits == x[j * 8 + i].bits);
    }
    {
      const int n = 64 * 37;
      uint32_t* in = static_cast<uint32_t*>(guarded(n * 4));
      for (int i = 0; i < n; ++i) in[i] = rand();
      uint64_t* out = static_cast<uint64_t*>(guarded(8 * 4 * 5));
      CHECK(cudaFuncSetAttribute(ring<4>, cudaFuncAttributeMaxDynamicSharedMemorySize, 100000) == cudaSuccess);
      ring<4><<<dim3(5), 128, 4 * 4 * 256, cudaStream_t(nullptr)>>>(in, n, out);
      uint64_t want = 0;
      for (int i = 0; i < n; ++i) want += static_cast<uint64_t>(in[i]) * (i % 64 < 32 ? i / 64 + 1 : 1);
      for (int i = 0; i < 20; ++i) CHECK(out[i] == want);
      uint32_t *old = static_cast<uint32_t*>(guarded(128)), sum = 0, got = 0;
      ring_old<<<1, 32, 3 * 512>>>(in, n / 128, old);
      for (int i = 0; i < n / 128 * 128; ++i) sum += in[i];
      for (int i = 0; i < 32; ++i) got += old[i];
      CHECK(sum == got);
      emu::release(in), emu::release(out), emu::release(old);
    }
    {
      const int blocks = 4, threads = 256;
      float4* mail = static_cast<float4*>(guarded(blocks * threads * 16));
      float* out = static_cast<float*>(guarded(blocks * threads * 4));
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(blocks), config.blockDim = dim3(threads);
      cudaLaunchAttribute attribute[1];
      attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attribute[0].val.programmaticStreamSerializationAllowed = 1;
      config.attrs = attribute, config.numAttrs = 1;
      CHECK(cudaLaunchKernelEx(&config, exchange, mail, out) == cudaSuccess);
      for (int i = 0; i < blocks * threads; ++i) CHECK(out[i] == 10);
      unsigned count = 0;
      int last = -1;
      void* args[2];
      unsigned* pc = &count;
      int* pl = &last;
      args[0] = &pc, args[1] = &pl;
      CHECK(cudaLaunchCooperativeKernel(counter, dim3(8), dim3(64), args, 0, nullptr) == cudaSuccess);
      CHECK(count == 8 && last >= 0);
      int s[3];
      statics<<<3, 64>>>(s);
      CHECK(s[0] == 3 && s[2] == 3);
      emu::release(mail), emu::release(out);
    }
  }
  // conversions
  for (int i = 0; i < 65536; ++i) {
    const __half h = __ushort_as_half(static_cast<unsigned short>(i));
    if (!__hisnan(h)) CHECK(__half_as_ushort(__float2half(__half2float(h))) == i);
  }
  CHECK(__half_as_ushort(__float2half(1 + 0x1p-11f)) == 0x3C00 && __half_as_ushort(__float2half(1 + 0x3p-11f)) == 0x3C02);
  CHECK(__bfloat16_as_ushort(__float2bfloat16(1 + 0x1p-8f)) == 0x3F80 && __bfloat16_as_ushort(__float2bfloat16(1 + 0x3p-8f)) == 0x3F82);
  CHECK(__byte_perm(0x33221100, 0x77665544, 0x8c95 & 0xFFFF) == 0x00441155);
  shuffles<<<1, 2000>>>(nullptr);
  CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration && cudaGetLastError() == cudaSuccess);
  CHECK(emu::errors == 0);
  printf(bad ? "%d checks FAILED\n" : "emulator: all checks passed\n", bad);
  return bad != 0;
}
