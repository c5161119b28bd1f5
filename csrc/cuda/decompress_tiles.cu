// decompress to 16-bit numbers, at the rate of memory up to D = 128.
//
// One persistent block on each SM, of `kGroups` warpgroups that work on their own: no barrier after
// the start. A warpgroup takes 64 vectors at a time, a warp 16 of them (fragments: codec.cuh):
//   fetch      the next 16 vectors' bytes and norms come to registers while this tile is computed:
//              thread (g, t) loads 4 bytes, 8 coordinates, of each chunk of 32 of its two vectors
//   decode     a table finds the two fp16 levels of a byte, one register of operand A; each lane
//              has a copy in its own bank, so that it never conflicts
//   multiply   64 coordinates at a time with the transposed rotation, which the block keeps in fp16
//   store      times the norm; the rotation's columns are ordered such that a thread has 8 adjacent
//              coordinates of a vector, 16 bytes, and four threads write 64
//
// Levels are scaled by a power of two that brings the largest to 2^8, undone with the norm.
//
// Shared memory: the rotation, 2 D² bytes (D = 512: 128 of its columns, four blocks share a tile,
// each decodes it all), and 32 KB for the table. D = 128: 64 KB.
//
// Per coordinate of D = 128, in clocks of an SM: memory 0.15 (2.5 bytes at 4.3 TB/s); tensor cores
// 0.0625 (D = 256: 0.125, 512: 0.25); shared memory 0.05 (b 0.03, table 0.02); about 9
// instructions, 0.07. Before the first tile each block reads its part of the rotation.
#include <algorithm>

#include "codec.cuh"

namespace tq::cuda {
namespace {

template <int D>
struct Shape {
  static constexpr int kChunks = chunks_of(D);
  static constexpr int K = 32 * kChunks;            // D, padded with zeros
  static constexpr int kPart = D <= 256 ? D : 128;  // coordinates that a block computes
  static constexpr int kGroups = D <= 128 ? 4 : D <= 256 ? 3 : 2;
  static constexpr int kRotationBytes = kPart * K * 2;
  static constexpr int kTableBytes = 256 * 32 * 4;

  // The coordinate, of 32 or fewer that are stored at once, in column n of the product: thread t
  // has columns 8j + 2t and 8j + 2t + 1, which become its coordinates 2j and 2j + 1.
  __device__ static unsigned column(unsigned n) {
    const unsigned first = n / 32 * 32, size = kPart - first < 32 ? kPart - first : 32;
    return first + n % 8 / 2 * (size / 4) + n % 32 / 8 * 2 + n % 2;
  }
};

// What lane r loads of vector r. The bits of the norm are looked at when they have come.
struct Row {
  int64_t x = -1;      // where it goes
  int64_t offset = 0;  // where its offset is
  uint32_t norm_bits = 0;
  uint16_t bfloat_bits = 0;
};

template <int D>
__global__ void __launch_bounds__(128 * Shape<D>::kGroups, 1)
    decompress_tiles(const __grid_constant__ DecompressProblem p, const Order order) {
  using S = Shape<D>;
  constexpr int kParts = D / S::kPart, kSteps = 2 * S::kChunks;
  extern __shared__ __align__(128) uint8_t shared[];
  auto* table = reinterpret_cast<uint32_t*>(shared + S::kRotationBytes);  // [byte][lane]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const auto vectors = static_cast<uint32_t>(p.B * p.H * p.S), tiles = (vectors + 63) / 64;
  const int part = blockIdx.x % kParts;
  const uint32_t stride = gridDim.x / kParts * (blockDim.x / 128);
  uint32_t tile = blockIdx.x / kParts + gridDim.x / kParts * (warp / 4);

  uint32_t bytes[S::kChunks][2] = {};
  const auto fetch = [&](uint32_t tile) {
    Row row;
    int64_t from = -1;
    const uint32_t vector = tile * 64 + warp % 4 * kRows + lane;
    if (lane < kRows && vector < vectors) {
      const Position at(vector, order);
      from = offset_of(p.packed, at.b, at.h, at.s);
      row.x = offset_of(p.x, at.b, at.h, at.s) + part * S::kPart;
      row.offset = offset_of(p.offset, at.b, at.h, 0);
      const int64_t norm = offset_of(p.norms, at.b, at.h, at.s);
      if (p.norms.dtype == Dtype::f32)
        row.norm_bits = static_cast<const uint32_t*>(p.norms.data)[norm];
      else
        row.bfloat_bits = static_cast<const uint16_t*>(p.norms.data)[norm];
    }
    for (int r = 0; r < 2; ++r) {
      const int64_t at = __shfl_sync(~0u, from, g + 8 * r);
#pragma unroll
      for (int c = 0; c < S::kChunks; ++c)
        if (at >= 0 && 32 * c + 8 * t < D)
          bytes[c][r] = __ldg(reinterpret_cast<const uint32_t*>(
              static_cast<const uint8_t*>(p.packed.data) + at + 16 * c + 4 * t));
    }
    return row;
  };
  Row next = fetch(tile);

  float largest = 0;
  for (int i = 0; i < kLevels; ++i) largest = fmaxf(largest, fabsf(p.centroids[i]));
  const bool usual = largest > 0x1p-100f && largest < 0x1p100f;
  const float unit = usual ? scalbnf(1, ilogbf(largest) - 8) : 1;
  for (int i = threadIdx.x; i < 256 * 32; i += blockDim.x) {
    const auto byte = static_cast<uint8_t>(i / 32);
    table[i] = half_pair(p.centroids[even_index(byte)] / unit, p.centroids[odd_index(byte)] / unit);
  }
  // The rotation: a thread takes 8 rows of a column, a warp 32 adjacent columns.
  struct Eight {
    float x[8];
  };
  in_batches<4>(
      threadIdx.x, S::kPart * S::K / 8, blockDim.x,
      [&](unsigned i) {
        const unsigned row = coordinate(i / S::kPart);
        const float* from = p.rotation + row * D + part * S::kPart + S::column(i % S::kPart);
        Eight eight = {};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const int below = j / 2 * 8 + j % 2;
          if (D % 32 == 0 || row + below < D) eight.x[j] = __ldg(from + below * D);
        }
        return eight;
      },
      [&](unsigned i, const Eight& eight) {
        const auto& x = eight.x;
        *reinterpret_cast<uint4*>(shared + core_offset<S::K>(i % S::kPart, i / S::kPart * 8)) =
            uint4{half_pair(x[0], x[1]), half_pair(x[2], x[3]), half_pair(x[4], x[5]),
                  half_pair(x[6], x[7])};
      });
  publish();
  __syncthreads();
  const uint32_t rotation_address = shared_address(shared);

  for (; tile < tiles; tile += stride) {
    const Row row = next;
    uint32_t a[kSteps][4];
#pragma unroll
    for (int c = 0; c < S::kChunks; ++c)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const auto levels = [&](int i) { return table[(bytes[c][r] >> 8 * i & 255) * 32 + lane]; };
        place(a[2 * c], a[2 * c + 1], r, uint4{levels(0), levels(1), levels(2), levels(3)});
      }
    next = fetch(tile + stride);

    const float norm = p.norms.dtype == Dtype::f32
                           ? __uint_as_float(row.norm_bits)
                           : __uint_as_float(static_cast<uint32_t>(row.bfloat_bits) << 16);
    int64_t to[2], offset[2];
    float length[2];
    for (int r = 0; r < 2; ++r) {
      to[r] = __shfl_sync(~0u, row.x, g + 8 * r);
      offset[r] = __shfl_sync(~0u, row.offset, g + 8 * r);
      length[r] = __shfl_sync(~0u, norm, g + 8 * r);
    }

    const auto coordinates = [&]<int N>(int first) {
      constexpr int kWidth = N < 32 ? N / 4 : 8;  // adjacent coordinates of a thread
      float y[N / 2];
      multiply(y, a, rotation_address + core_offset<S::K>(first, 0));
#pragma unroll
      for (int part_of = 0; part_of < N / (4 * kWidth); ++part_of)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int d = first + 4 * kWidth * part_of + kWidth * t;
          float x[kWidth];
#pragma unroll
          for (int i = 0; i < kWidth; ++i)
            x[i] = y[(kWidth * part_of + i / 2 * 2) * 2 + 2 * r + i % 2] * unit * length[r];
          if (p.offset)
#pragma unroll
            for (int i = 0; i < kWidth; ++i)
              x[i] += load_element(p.offset,
                                   offset[r] + (part * S::kPart + d + i) * p.offset.stride[3]);
          uint32_t out[kWidth / 2];
#pragma unroll
          for (int i = 0; i < kWidth / 2; ++i) {
            const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
            out[i] = p.x.dtype == Dtype::f16 ? half_pair(x[2 * i], x[2 * i + 1])
                                             : reinterpret_cast<const uint32_t&>(pair);
          }
          if (to[r] < 0) continue;
          auto* at = static_cast<uint16_t*>(p.x.data) + to[r] + d;
          if constexpr (kWidth == 8)
            *reinterpret_cast<uint4*>(at) = uint4{out[0], out[1], out[2], out[3]};
          else
            *reinterpret_cast<uint2*>(at) = uint2{out[0], out[1]};
        }
    };
#pragma unroll 1
    for (int first = 0; first + 64 <= S::kPart; first += 64)
      coordinates.template operator()<64>(first);
    if constexpr (S::kPart % 64 != 0)
      coordinates.template operator()<S::kPart % 64>(S::kPart / 64 * 64);
  }
}

template <int D>
constexpr int shared_bytes() {
  return Shape<D>::kRotationBytes + Shape<D>::kTableBytes;
}

}  // namespace

bool decompress_tiles_fit(const DecompressProblem& p) {
  if (!tuned_dim(p.D) || p.x.dtype == Dtype::f32 || p.B * p.H * p.S >= 1 << 30) return false;
  if (!aligned_rows(p.packed, 1, 4) || !aligned_rows(p.x, 2, 16)) return false;
  return for_tuned_dim(p.D, [](auto dim) { return shared_bytes<dim>() <= shared_limit(); });
}

cudaError_t launch_decompress_tiles(const DecompressProblem& p, cudaStream_t stream) {
  return for_tuned_dim(p.D, [&](auto dim) {
    constexpr int D = dim, kParts = D / Shape<D>::kPart, kGroups = Shape<D>::kGroups;
    unsigned blocks = 0;
    const cudaError_t error = prepare<decompress_tiles<D>>(shared_bytes<D>(), &blocks);
    if (error != cudaSuccess) return error;
    const int64_t tiles = (p.B * p.H * p.S + 63) / 64;
    const auto useful = static_cast<unsigned>(kParts * ((tiles + kGroups - 1) / kGroups));
    blocks = std::min(blocks / kParts * kParts, useful);
    decompress_tiles<D><<<blocks, 128 * kGroups, shared_bytes<D>(), stream>>>(p, Order(p));
    return cudaGetLastError();
  });
}

}  // namespace tq::cuda
