// compress and update_ of many vectors of 16-bit numbers, at the rate of memory up to D = 128.
//
// One persistent block on each SM, of `kGroups` warpgroups that work on their own: no barrier after
// the start. A warpgroup takes 64 vectors at a time, a warp 16 of them (fragments: codec.cuh):
//   fetch      cp.async brings the next 16 vectors while this tile is computed, each thread to
//              places that only it reads back, 16 bytes at a time: no conflict, no barrier
//   normalise  squares on the tensor cores; fp16 operands, scaled by a power of two per vector
//   multiply   64 coordinates at a time with the rotation, which the block keeps in fp16
//   encode     a coordinate's bin of 32 finds the one boundary it can lie beyond, by one shuffle
//   store      a byte of each pair; the rotation's rows are ordered such that a thread has 8
//              adjacent bytes of a vector and four threads write 32
//
// Shared memory: the rotation, 2 D² bytes (D = 512: 128 of its rows, four blocks share a tile, each
// reads it all: three times from L2), and 32 D bytes a warp for the next tile (D = 512: half).
// D = 128: 32 + 64 KB, 64 KB in flight on each SM, twice what hides the latency of memory.
//
// Per coordinate of D = 128, in clocks of an SM: memory 0.15 (2.5 bytes at 4.3 TB/s); tensor cores
// 0.0625 (D = 256: 0.125, 512: 0.25); shared memory and shuffles 0.1 (b 0.03, x 0.03, bins 0.03);
// about 18 instructions, 0.14, 8 of them to encode. Before the first tile each block reads its part
// of the rotation, D = 256 and 512: 256 KB, 6 us for all at the rate of L2. D = 512 is bound by L2,
// which delivers 8 bytes a coordinate, and tensor cores.
#include <algorithm>

#include "codec.cuh"

namespace tq::cuda {
namespace {

template <int D>
struct Shape {
  static constexpr int kChunks = chunks_of(D);
  static constexpr int K = 32 * kChunks;            // D, padded with zeros
  static constexpr int kPart = D <= 256 ? D : 128;  // coordinates that a block computes
  static constexpr int kFetched = D <= 256 ? kChunks : kChunks / 2;  // chunks fetched ahead
  static constexpr int kGroups = D == 64 ? 5 : D <= 128 ? 4 : D <= 256 ? 3 : 2;
  static constexpr int kRotationBytes = kPart * K * 2;
  static constexpr int kFetchBytes = kFetched * 2 * 32 * 16;  // of one warp

  // The coordinate, of 64 or fewer that are multiplied at once, in column n of the product: thread
  // t has columns 8j + 2t and 8j + 2t + 1, which become its byte j.
  __device__ static unsigned column(unsigned n) {
    const unsigned first = n / 64 * 64, size = kPart - first < 64 ? kPart - first : 64;
    return first + n % 8 / 2 * (size / 4) + n % 64 / 8 * 2 + n % 2;
  }
};

// Indices by bins. Lane i of a warp answers for the i-th of 32 bins between the outermost
// boundaries: how many boundaries lie in the bins below, in the low 4 bits of the boundary within
// (which moves it by 2^-20 of itself). Boundaries that share a bin are counted one by one.
struct Encoder {
  const float* boundaries;
  float scale, shift;
  uint32_t entry;
  bool regular;

  __device__ explicit Encoder(const float* boundaries) : boundaries(boundaries) {
    const float low = boundaries[0], high = boundaries[kBoundaries - 1];
    scale = 1 / (high - low);
    shift = -low * scale;
    float inside = INFINITY;
    int hits = 0;
    uint32_t below = 0;
    for (int i = 0; i < kBoundaries; ++i) {
      const unsigned at = bin(boundaries[i]) % 32;
      below += at < threadIdx.x % 32;
      if (at == threadIdx.x % 32) inside = boundaries[i] + 0.0f, ++hits;  // no -0
    }
    entry = (__float_as_uint(inside) & ~15u) | below;
    regular = __all_sync(~0u, hits < 2 && scale > 0 && scale < 1e30f);
  }

  // Rises with y, so that a lower bin is a smaller y.
  __device__ unsigned bin(float y) const {
    return __float_as_uint(fmaf(__saturatef(fmaf(y, scale, shift)), 31, 0x1p23f));
  }
  // The byte of two coordinates, and what may be above it.
  __device__ uint32_t by_bin(float even, float odd) const {
    const uint32_t first = __shfl_sync(~0u, entry, bin(even));
    const uint32_t second = __shfl_sync(~0u, entry, bin(odd));
    uint32_t byte = (first << 4 & ~15u) | (second & 15);
    if (even > __uint_as_float(first)) byte += 16;
    if (odd > __uint_as_float(second)) byte += 1;
    return byte;
  }
  __device__ uint32_t by_count(float even, float odd) const {
    uint32_t byte = 0;
#pragma unroll 1
    for (int i = 0; i < kBoundaries; ++i)
      byte += 16 * (even > __ldg(boundaries + i)) + (odd > __ldg(boundaries + i));
    return byte;
  }
};

// Lane r's vector of a tile. The bits of its slot are looked at when they have come.
struct Row {
  Position at;
  bool exists = false;
  uint32_t slot_bits[2] = {};

  __device__ void load_slot(const Integers& slots) {
    const int64_t i = at.b * slots.stride[0] + at.s * slots.stride[1];
    const auto* from = static_cast<const uint32_t*>(slots.data) + (slots.wide ? 2 * i : i);
    slot_bits[0] = from[0];
    if (slots.wide) slot_bits[1] = from[1];
  }
  __device__ int64_t slot(const CompressProblem& p) const {
    const int64_t wide = static_cast<int64_t>(slot_bits[1]) << 32 | slot_bits[0];
    const int64_t slot = !p.slot ? at.s : p.slot.wide ? wide : static_cast<int32_t>(slot_bits[0]);
    return exists && slot < p.capacity ? slot : -1;
  }
};

template <int D>
__global__ void __launch_bounds__(128 * Shape<D>::kGroups, 1)
    compress_tiles(const __grid_constant__ CompressProblems problems, const Order order,
                   int count) {
  using S = Shape<D>;
  constexpr int kParts = D / S::kPart, kSteps = 2 * S::kChunks;
  extern __shared__ __align__(128) uint8_t shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const CompressProblem& first_problem = problems.of[0];
  const auto T = static_cast<uint32_t>(first_problem.S);
  const auto vectors = static_cast<uint32_t>(first_problem.B * first_problem.H * first_problem.S);
  const uint32_t tiles = (vectors + 63) / 64;  // of each problem
  const int part = blockIdx.x % kParts;
  const uint32_t stride = gridDim.x / kParts * (blockDim.x / 128);
  uint32_t tile = blockIdx.x / kParts + gridDim.x / kParts * (warp / 4);

  auto* fetched = reinterpret_cast<uint4*>(shared + S::kRotationBytes + warp * S::kFetchBytes);
  fetched += lane;  // [chunk][row][lane]
  const uint32_t fetched_address = shared_address(fetched);
  const uint32_t rotation_address = shared_address(shared);

  // Where the thread's 8 coordinates of the first chunk lie, of its two vectors; null: none.
  const uint16_t* source[2] = {};
  const auto inside = [&](int chunk) { return 32 * chunk + 32 <= D || 32 * chunk + 8 * t < D; };
  const auto fetch = [&](uint32_t tile) {
    Row row;
    int64_t offset = -1;
    if (tile < count * tiles) {
      const int side = tile >= tiles;
      const CompressProblem& p = problems.of[side];
      const uint32_t vector = (tile - side * tiles) * 64 + warp % 4 * kRows + lane;
      if (lane < kRows && vector < vectors) {
        row.exists = true;
        row.at = Position(vector, order);
        if (p.slot) row.load_slot(p.slot);
        offset = offset_of(p.x, row.at.b, row.at.h, row.at.s);
      }
      const auto* x = static_cast<const uint16_t*>(p.x.data);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t mine = __shfl_sync(~0u, offset, g + 8 * r);
        source[r] = mine < 0 ? nullptr : x + mine + 8 * t;
        const uint16_t* from = source[r] ? source[r] : x;
#pragma unroll
        for (int c = 0; c < S::kFetched; ++c)
          copy16_async(fetched_address + (2 * c + r) * 512, inside(c) ? from + 32 * c : x,
                       source[r] && inside(c) ? 16 : 0);
      }
    }
    copies_commit();
    return row;
  };
  Row next = fetch(tile);

  // The rotation: four threads take 32 adjacent columns of a row, two 16-byte loads each.
  struct Eight {
    float4 half[2];
  };
  in_batches<4>(
      threadIdx.x / 4, S::kPart * S::kChunks, blockDim.x / 4,
      [&](unsigned i) {
        const unsigned row = part * S::kPart + S::column(i % S::kPart);
        const unsigned d = i / S::kPart * 32 + 8 * t;
        if (d >= D) return Eight{};
        const auto* from = reinterpret_cast<const float4*>(first_problem.rotation + row * D + d);
        return Eight{__ldg(from), __ldg(from + 1)};
      },
      [&](unsigned i, const Eight& eight) {
        auto* to = shared + core_offset<S::K>(i % S::kPart, i / S::kPart * 32 + 2 * t);
        for (int step = 0; step < 2; ++step, to += 256) {
          const float4 x = eight.half[step];
          *reinterpret_cast<uint32_t*>(to) = half_pair(x.x, x.y);
          *reinterpret_cast<uint32_t*>(to + 128) = half_pair(x.z, x.w);
        }
      });
  publish();
  const Encoder encoder(first_problem.boundaries);
  const float level = first_problem.centroids ? first_problem.centroids[lane % kLevels] : 0;

  bool ascending = true;
  const Integers& slots = first_problem.slot;
  for (int64_t b = 0; slots && b < (slots.stride[0] ? first_problem.B : 1); ++b) {
    const int64_t row = b * slots.stride[0];
    ascending &= slots.wide
                     ? ascend(static_cast<const int64_t*>(slots.data) + row, slots.stride[1], T)
                     : ascend(static_cast<const int32_t*>(slots.data) + row, slots.stride[1], T);
  }
  ascending = __syncthreads_and(ascending);

  for (; tile < count * tiles; tile += stride) {
    const CompressProblem& p = problems.of[tile >= tiles];
    const Row row = next;

    uint32_t a[kSteps][4];
#pragma unroll
    for (int c = S::kFetched; c < S::kChunks; ++c)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        uint4 x = {};
        if (source[r]) x = __ldg(reinterpret_cast<const uint4*>(source[r] + 32 * c));
        place(a[2 * c], a[2 * c + 1], r, x);
      }
    copies_wait<0>();
#pragma unroll
    for (int c = 0; c < S::kFetched; ++c)
#pragma unroll
      for (int r = 0; r < 2; ++r) place(a[2 * c], a[2 * c + 1], r, fetched[(2 * c + r) * 32]);
    const Lengths lengths = normalise(a, p.x.dtype);
    next = fetch(tile + stride);

    int64_t slot = row.slot(p);
    if (!ascending && superseded(p, row.at, slot)) slot = -1;
    const int64_t bytes =
        slot < 0 ? -1 : offset_of(p.packed, row.at.b, row.at.h, slot) + part * S::kPart / 2;
    const int64_t to[2] = {__shfl_sync(~0u, bytes, g), __shfl_sync(~0u, bytes, g + 8)};

    float length[2] = {}, product[2] = {};  // this thread's part of |ŷ|² and ⟨y, ŷ⟩
    const auto coordinates = [&]<int N>(int first) {
      constexpr int kBytes = N / 8;  // of the thread, in each vector
      float y[N / 2];
      multiply(y, a, rotation_address + core_offset<S::K>(first, 0));
      uint32_t word[2][2] = {};
      const auto encode = [&](auto byte_of) {
#pragma unroll
        for (int i = 0; i < N / 2; i += 2) {
          const int r = i / 2 % 2, j = i / 4;
          const float inverse = lengths.inverse[r];
          const uint32_t byte = byte_of(y[i] * inverse, y[i + 1] * inverse);
          word[r][j / 4] = __byte_perm(word[r][j / 4], byte, 0x3210 + ((4 - j % 4) << j % 4 * 4));
        }
      };
      if (encoder.regular)
        encode([&](float even, float odd) { return encoder.by_bin(even, odd); });
      else
        encode([&](float even, float odd) { return encoder.by_count(even, odd); });
      if (p.policy != NormPolicy::l2) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
          const int r = i / 2 % 2, j = i / 4;
          const uint32_t index = word[r][j / 4] >> (j % 4 * 8 + (i % 2 ? 0 : 4));
          const float rounded = __shfl_sync(~0u, level, index);
          length[r] = fmaf(rounded, rounded, length[r]);
          product[r] = fmaf(rounded, y[i] * lengths.inverse[r], product[r]);
        }
      }
      for (int r = 0; r < 2; ++r) {
        if (to[r] < 0) continue;
        auto* at = static_cast<uint8_t*>(p.packed.data) + to[r] + first / 2 + kBytes * t;
        if constexpr (kBytes == 8)
          *reinterpret_cast<uint2*>(at) = uint2{word[r][0], word[r][1]};
        else if constexpr (kBytes == 4)
          *reinterpret_cast<uint32_t*>(at) = word[r][0];
        else
          *reinterpret_cast<uint16_t*>(at) = static_cast<uint16_t>(word[r][0]);
      }
    };
#pragma unroll 1
    for (int first = 0; first + 64 <= S::kPart; first += 64)
      coordinates.template operator()<64>(first);
    if constexpr (S::kPart % 64 != 0)
      coordinates.template operator()<S::kPart % 64>(S::kPart / 64 * 64);

    float norm[2] = {lengths.norm[0], lengths.norm[1]};
    if (p.policy != NormPolicy::l2)
      for (int r = 0; r < 2; ++r)
        norm[r] = stored_norm(p.policy, norm[r], quad_sum(length[r]), quad_sum(product[r]));
    const float low = __shfl_sync(~0u, norm[0], lane % 8 * 4);
    const float high = __shfl_sync(~0u, norm[1], lane % 8 * 4);
    if (part == 0 && slot >= 0)
      store_element(p.norms, offset_of(p.norms, row.at.b, row.at.h, slot), lane < 8 ? low : high);
  }
}

// Warpgroups that fit a block of this device; 0: none.
template <int D>
int groups_that_fit() {
  const int fit = (shared_limit() - Shape<D>::kRotationBytes) / (4 * Shape<D>::kFetchBytes);
  return std::clamp(fit, 0, Shape<D>::kGroups);
}

}  // namespace

bool compress_tiles_fit(const CompressProblem& p) {
  if (p.D == 512 && p.policy != NormPolicy::l2) return false;  // no block sees a whole vector
  if (!aligned_rows(p.packed, 1, 8)) return false;
  return for_tuned_dim(p.D, [](auto dim) { return groups_that_fit<dim>() > 0; });
}

cudaError_t launch_compress_tiles(const CompressProblems& problems, int count,
                                  cudaStream_t stream) {
  const CompressProblem& p = problems.of[0];
  return for_tuned_dim(p.D, [&](auto dim) {
    constexpr int D = dim, kParts = D / Shape<D>::kPart;
    const int groups = groups_that_fit<D>();
    const int bytes = Shape<D>::kRotationBytes + 4 * groups * Shape<D>::kFetchBytes;
    unsigned blocks = 0;
    const cudaError_t error = prepare<compress_tiles<D>>(bytes, &blocks);
    if (error != cudaSuccess) return error;
    const int64_t tiles = count * ((p.B * p.H * p.S + 63) / 64);
    const auto useful = static_cast<unsigned>(kParts * ((tiles + groups - 1) / groups));
    blocks = std::min(blocks / kParts * kParts, useful);
    compress_tiles<D><<<blocks, 128 * groups, bytes, stream>>>(problems, Order(p), count);
    return cudaGetLastError();
  });
}

}  // namespace tq::cuda
