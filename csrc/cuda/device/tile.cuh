// How 32 packed positions lie in shared memory, and which lane of a warp reads which bytes of them.
//
// A unit is 32 consecutive keys (or values) of one head: 32 rows of D/2 bytes. A warp takes it as
// two tiles of 16 rows. In the fragments of the matrix products (device/ptx.cuh; g = lane / 4,
// t = lane % 4) a key tile is the left operand, rows = positions, and lane (g, t) reads the t-th
// quarter of rows g and g + 8; a value tile is transposed, rows = coordinates, and the lane reads
// the g-th eighth of rows 2t, 2t + 1, 2t + 8 and 2t + 9. Which position is which row of a tile, and
// which coordinates make a quarter or an eighth, is free: sums do not depend on order. Both are
// chosen so that each load of a warp meets every bank of shared memory at most once, which the
// static_assert below proves for each D:
//   - a quarter is made of chunks that interleave: chunk c of lane t starts at byte (4c + t) ·
//   width
//   - rows of 64 bytes or a multiple of 128 would all start in the same few banks, so the unit is
//     cut into 2 or 4 blocks, each shifted 32 or 64 bytes further
// The unit's 32 norms (bf16) follow its rows.
#pragma once

#include <cstdint>
#include <type_traits>

namespace tq::cuda {

inline constexpr int kUnit = 32;  // positions

template <int D>
struct Tile {
  static constexpr int kRow = D / 2, kUnitBytes = kUnit * kRow;
  // Blocks of equal numbers of rows, and how far each is shifted.
  template <int kBlocks_, int kShift_>
  struct Layout {
    static constexpr int kBlocks = kBlocks_, kShift = kShift_, kRows = kUnit / kBlocks;
    // Where a row starts.
    static constexpr __host__ __device__ int offset(int position) {
      return position * kRow + position / kRows * kShift;
    }
  };
  static constexpr bool kLongRows = kRow % 128 == 0;
  using Keys = Layout<kLongRows ? 2 : 1, 64>;
  using Values = Layout<kLongRows ? 4 : kRow == 64 ? 2 : 1, 32>;
  template <int kValues>
  using Side = std::conditional_t<kValues, Values, Keys>;
  static constexpr int kNorms = kUnit * kRow + (kLongRows ? 96 : kRow == 64 ? 32 : 0);
  static constexpr int kBytes = kNorms + kUnit * 2;

  static constexpr int chunk_width(int bytes) {
    int width = 16;
    while (bytes % width) width /= 2;
    return width;
  }
  static constexpr int kQuarter = kRow / 4, kEighth = kRow / 8;
  static constexpr int kKeyChunk = chunk_width(kQuarter), kValueChunk = chunk_width(kEighth);

  // The position that is row `row` (0 to 15) of tile `tile` (0 or 1).
  static constexpr __host__ __device__ int position(int tile, int row) {
    const int low = row & 7, high = row >> 3;
    if constexpr (kLongRows) {
      // Rows 0, 2, 4, 6 in different blocks, 1, 3, 5, 7 too, and row 2k + 1 two blocks from 2k.
      const int block = low & 1 ? (low >> 1) ^ 2 : low >> 1;
      return block * 8 + (2 * tile + high) * 2 + (low & 1);
    } else if constexpr (kRow == 64) {
      const int gray = (low & 3) ^ (low & 3) >> 1;
      return (low >> 2) * 16 + 8 * tile + 4 * high + gray;
    } else if constexpr (kRow % 64 == 32) {
      return 16 * tile + (row ^ (low >> 2));
    } else {
      return 16 * tile + row;
    }
  }

  // Chunk `chunk` of lane t's quarter of a key, of lane group g's eighth of a value: its first
  // byte.
  static constexpr __host__ __device__ int key_byte(int chunk, int t) {
    return (4 * chunk + t) * kKeyChunk;
  }
  static constexpr __host__ __device__ int value_byte(int chunk, int g) {
    return (8 * chunk + g) * kValueChunk;
  }
  // The byte (two coordinates) that is number i of lane group g's eighth.
  static constexpr __host__ __device__ int value_coordinate_pair(int i, int g) {
    return value_byte(i / kValueChunk, g) + i % kValueChunk;
  }

 private:
  // Whether 32 lanes that load `width` bytes each at these addresses meet no bank twice.
  static constexpr bool one_pass(const int (&address)[32], int width) {
    const int together = width > 4 ? 128 / width : 32;
    for (int first = 0; first < 32; first += together) {
      int word_in_bank[32];
      for (int& word : word_in_bank) word = -1;
      for (int lane = first; lane < first + together; ++lane)
        for (int byte = 0; byte < width; byte += 4) {
          const int word = (address[lane] + byte) / 4;
          int& there = word_in_bank[word % 32];
          if (there != -1 && there != word) return false;
          there = word;
        }
    }
    return true;
  }

  static constexpr int kRowsOfLane[4] = {0, 1, 8, 9};  // of a value tile, less 2t

  static constexpr bool every_position_once() {
    bool seen[kUnit] = {};
    for (int row = 0; row < kUnit; ++row) seen[position(row / 16, row % 16)] = true;
    for (bool s : seen)
      if (!s) return false;
    return true;
  }

 public:
  static constexpr bool conflict_free() {
    for (int tile = 0; tile < 2; ++tile)
      for (const int extra : kRowsOfLane) {
        int key[32] = {}, value[32] = {};
        for (int lane = 0; lane < 32; ++lane) {
          const int g = lane / 4, t = lane % 4;
          key[lane] = Keys::offset(position(tile, g + (extra & 8))) + key_byte(0, t);
          value[lane] = Values::offset(position(tile, 2 * t + extra)) + value_byte(0, g);
        }
        if (!one_pass(key, kKeyChunk) || !one_pass(value, kValueChunk)) return false;
      }
    return every_position_once();
  }
};

static_assert(Tile<64>::conflict_free() && Tile<80>::conflict_free() && Tile<96>::conflict_free());
static_assert(Tile<128>::conflict_free() && Tile<192>::conflict_free());
static_assert(Tile<256>::conflict_free() && Tile<512>::conflict_free());

}  // namespace tq::cuda
