// A warp's own ring of shared-memory slots that asynchronous copies fill ahead of it. Keys and
// values of a unit alternate: slot 0 keys, slot 1 values, slot 2 keys of the next unit, ... No
// other warp copies into it, so a warp never waits for another. A slot is filled by bulk copies,
// which count their bytes on its barrier; in a portable ring by copies of 16 bytes a lane (7 %
// slower on an H200), whose groups complete in order.
#pragma once

#include "ptx.cuh"
#include "tile.cuh"

namespace tq::cuda {

// Where units come from: unit 0, the others follow.
struct UnitSource {
  const char *rows, *norms;
};

template <int D, int kSlots>
class Ring {
  using T = Tile<D>;

 public:
  static constexpr int kBytes = kSlots * T::kBytes;
  static constexpr int kAhead = kSlots / 2;  // units

  // `slots`, `barriers` (8 bytes each): this warp's. All lanes of the warp together, as below.
  __device__ Ring(char* slots, char* barriers) : slots_(slots), barriers_(barriers) {}

  // Before anything else.
  __device__ void init() {
    if (threadIdx.x % 32 == 0) {
      for (int i = 0; i < kSlots; ++i) barrier_init(barrier(i), 1);
      barrier_init_fence();
    }
    __syncwarp();
  }

  // Before slots that were used otherwise are filled again, by all threads that used them.
  static __device__ void reuse() { fence_for_async(); }

  // Starts to fill slot `slot` with the first `count` positions of a unit, if any; the norms of the
  // others become zero. Slots are filled in the order in which they are waited for. Every lane has
  // read what the slot held before. Keys in even slots, values in odd. `source` lies in shared
  // memory, since the loop over units needs the registers.
  template <int kValues>
  __device__ void fill(int slot, const UnitSource& source, int unit, int count) {
    if (count <= 0) return;
    __syncwarp();
    if (count < kUnit)
      fill_part<kValues>(slot, source, unit, count);
    else if (elect_one())
      copy<kValues>(slot, source, unit, kUnit * T::kRow, kUnit * 2);
  }

  // Slot `slot`, once it is full for the `round`-th time.
  __device__ const char* wait(int slot, uint32_t round) {
    barrier_wait(barrier(slot), round & 1);
    __syncwarp();
    return slots_ + slot * T::kBytes;
  }

 private:
  __device__ uint32_t barrier(int slot) { return shared_address(barriers_) + 8 * slot; }

  // The last unit. What is no multiple of 16 bytes goes by hand: a few norms, and half of 16 bytes
  // of D = 80.
  template <int kValues>
  __device__ void fill_part(int slot, const UnitSource& source, int unit, int count) {
    char* const to = slots_ + slot * T::kBytes;
    const char* const rows = source.rows + static_cast<int64_t>(unit) * T::kUnitBytes;
    const char* const norms = source.norms + unit * (kUnit * 2);
    const int lane = threadIdx.x % 32;
    if (lane >= (count & ~7))
      reinterpret_cast<uint16_t*>(to + T::kNorms)[lane] =
          lane < count ? reinterpret_cast<const uint16_t*>(norms)[lane] : 0;
    if constexpr (T::kRow % 16 != 0) {
      const int byte = (count * T::kRow & ~15) + lane * 4;
      if (byte < count * T::kRow)
        *reinterpret_cast<uint32_t*>(to + byte) = *reinterpret_cast<const uint32_t*>(rows + byte);
    }
    if (elect_one()) copy<kValues>(slot, source, unit, count * T::kRow & ~15, count * 2 & ~15);
  }

  // By one thread.
  template <int kValues>
  __device__ void copy(int slot, const UnitSource& source, int unit, int bytes, int norm_bytes) {
    using Layout = T::template Side<kValues>;
    const uint32_t to = shared_address(slots_) + slot * T::kBytes;
    const uint32_t full = barrier(slot);
    const UnitSource from = source;
    const char* const rows = from.rows + static_cast<int64_t>(unit) * T::kUnitBytes;
    barrier_expect(full, bytes + norm_bytes);
#pragma unroll
    for (int block = 0; block < Layout::kBlocks; ++block) {
      const int first = block * Layout::kRows * T::kRow;
      const int mine = min(bytes - first, Layout::kRows * T::kRow);
      if (mine > 0) copy_bulk(to + first + block * Layout::kShift, rows + first, mine, full);
    }
    if (norm_bytes > 0)
      copy_bulk(to + T::kNorms, from.norms + unit * (kUnit * 2), norm_bytes, full);
  }

  char *slots_, *barriers_;
};

// The same with copies that every architecture from sm_80 on has.
template <int D, int kSlots>
class PortableRing {
  using T = Tile<D>;

 public:
  static constexpr int kBytes = kSlots * T::kBytes;
  static constexpr int kAhead = kSlots / 2;

  __device__ PortableRing(char* slots, char*) : slots_(slots) {}
  __device__ void init() {}
  static __device__ void reuse() {}

  template <int kValues>
  __device__ void fill(int slot, const UnitSource& source, int unit, int count) {
    using Layout = T::template Side<kValues>;
    __syncwarp();
    if (count > 0) {
      const int lane = threadIdx.x % 32;
      const uint32_t to = shared_address(slots_) + slot * T::kBytes;
      const char* const rows = source.rows + static_cast<int64_t>(unit) * T::kUnitBytes;
#pragma unroll
      for (int first = 0; first < T::kUnitBytes; first += 512) {
        const int byte = first + lane * 16;
        if (byte < T::kUnitBytes)
          copy16_async(to + byte + first / T::kRow / Layout::kRows * Layout::kShift, rows + byte,
                       count * T::kRow - byte);
      }
      if (lane < kUnit * 2 / 16)
        copy16_async(to + T::kNorms + lane * 16, source.norms + unit * (kUnit * 2) + lane * 16,
                     count * 2 - lane * 16);
    }
    copies_commit();  // a group for every slot, so that they can be counted
  }

  __device__ const char* wait(int slot, uint32_t) {
    copies_wait<kSlots - 1>();
    __syncwarp();
    return slots_ + slot * T::kBytes;
  }

 private:
  // Blocks of rows begin where a lane's row of copies does.
  static_assert(T::Keys::kBlocks == 1 || T::Keys::kRows * T::kRow % 512 == 0);
  static_assert(T::Values::kBlocks == 1 || T::Values::kRows * T::kRow % 512 == 0);

  char* slots_;
};

}  // namespace tq::cuda
