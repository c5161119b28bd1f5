// Who works on what, from the lengths that the device finds when it runs.
//
// An item is a KV head of a batch row with one tile of query rows; its keys are units of 32. A
// block works on segments: a whole item, or a part of one that it shares with the blocks next to
// it.
//
// Even: all items are equally long, and the host found a number of blocks that suits their number
// (plan_decode). So many blocks share an item, or so many items go to a block.
//
// Line (stream-K): all items' units, one after the other, are a line that is cut into equal pieces,
// one per block. Costs a microsecond more to work out, and serves any lengths.
#pragma once

#include <cstdint>

#include "../decode.h"
#include "ptx.cuh"
#include "tile.cuh"

namespace tq::cuda {

// What to ask segment_at() for: the block's first segment on the line; none. (Else: an item, or a
// place on the line.)
inline constexpr uint32_t kFirst = ~0u, kNone = ~1u;

struct Segment {
  uint32_t next;  // what to ask for the segment after this one
  int item, b, h, row_tile;
  int start, length;        // kv_start, kv_len
  int first_unit;           // of the item
  int from, to;             // this block's units, counted from first_unit
  int first_block, blocks;  // that share the item
  int rank;                 // of this block among them

  __device__ bool whole() const { return blocks == 1; }
};

__device__ inline uint32_t divide_up(uint32_t n, uint32_t by) { return (n + by - 1) / by; }

// Cuts `total` into `parts` that differ by one at most: where part `i` begins, which one holds `x`.
struct Cut {
  uint32_t quotient, remainder;

  __device__ Cut(uint32_t total, uint32_t parts)
      : quotient(total / parts), remainder(total % parts) {}
  __device__ uint32_t begin(uint32_t i) const { return i * quotient + min(i, remainder); }
  __device__ uint32_t part_of(uint32_t x) const {
    const uint32_t longer = remainder * (quotient + 1);
    return x < longer ? x / (quotient + 1) : remainder + (x - longer) / quotient;
  }
};

// Fills in what depends on the lengths of batch row b.
__device__ inline int measure(const AttentionProblem& p, Segment& s) {
  s.length = static_cast<int>(p.length(s.b));
  s.start = static_cast<int>(min(p.start(s.b), static_cast<int64_t>(s.length)));
  s.first_unit = s.start / kUnit;
  return static_cast<int>(divide_up(s.length, kUnit)) - s.first_unit;
}

__device__ inline Segment segment_of_item(const DecodeTask& task, uint32_t item) {
  const DecodePlan& plan = task.plan;
  const uint32_t heads = static_cast<uint32_t>(task.problem.Hkv);
  Segment s;
  s.item = item;
  const uint32_t head = plan.row_tiles == 1 ? item : item / plan.row_tiles;
  s.row_tile = item - head * plan.row_tiles;
  s.b = head < heads ? 0 : head / heads;
  s.h = head - s.b * heads;
  return s;
}

// On the line, an item is as long as its units, or longer if its rotation needs blocks.
__device__ inline uint32_t span(const DecodeTask& task, int b) {
  Segment s;
  s.b = b;
  return max(static_cast<uint32_t>(measure(task.problem, s)), task.plan.min_span);
}

// The segment of this block at a place on the line; kFirst: its first one. All threads of a warp
// together; seldom, and so out of line.
__device__ inline __noinline__ Segment segment_on_line(const DecodeTask& task, uint32_t place) {
  const uint32_t lane = threadIdx.x % 32, rows = task.problem.B, items = task.plan.items;
  const uint32_t per_row = items / rows, most = task.plan.blocks;
  uint32_t total = 0;
  for (uint32_t b = lane; b < rows; b += 32) total += span(task, b);
  total = __reduce_add_sync(~0u, total) * per_row;
  const uint32_t blocks = min(max(task.plan.worth(total), min(items, most)), most);
  const Cut line(total, blocks);
  const uint32_t end = line.begin(blockIdx.x + 1);
  if (place == kFirst) place = line.begin(blockIdx.x);

  Segment none = {};
  none.next = kNone;
  if (blockIdx.x >= blocks || place >= end) return none;

  // 32 batch rows at a time: the first whose end lies beyond the place.
  uint32_t before = 0, span_here = 0, b = 0;
  for (bool found = false; !found; b += 32) {
    const uint32_t mine = b + lane < rows ? span(task, b + lane) * per_row : 0;
    uint32_t sum = mine;
    for (uint32_t lanes = 1; lanes < 32; lanes *= 2) {
      const uint32_t left = __shfl_up_sync(~0u, sum, lanes);
      if (lane >= lanes) sum += left;
    }
    const uint32_t beyond = __ballot_sync(~0u, before + sum > place);
    const int at = beyond ? __ffs(beyond) - 1 : 31;
    span_here = __shfl_sync(~0u, mine, at);
    before += __shfl_sync(~0u, sum, at);
    if (beyond) {
      found = true;
      before -= span_here;
      b += at - 32;
    }
  }
  const uint32_t of_row = (place - before) / (span_here / per_row);
  Segment s = segment_of_item(task, b * per_row + of_row);
  const uint32_t item_begin = before + of_row * (span_here / per_row);
  const uint32_t item_end = item_begin + span_here / per_row;
  const int units = measure(task.problem, s);
  s.next = item_end < end ? item_end : kNone;
  s.from = place - item_begin;
  s.to = min(static_cast<int>(min(end, item_end) - item_begin), units);
  s.first_block = line.part_of(item_begin);
  s.blocks = line.part_of(item_end - 1) - s.first_block + 1;
  s.rank = blockIdx.x - s.first_block;
  return s;
}

// Even: blocks are a grid of those that share an item x groups of items.
__device__ inline uint32_t first_even_item(const DecodePlan& plan) {
  return blockIdx.y * plan.items_per_block;
}
__device__ inline Segment even_segment(const DecodeTask& task, uint32_t item) {
  const DecodePlan& plan = task.plan;
  Segment s = segment_of_item(task, item);
  const uint32_t units = measure(task.problem, s);
  const uint32_t blocks = min(plan.worth(units), static_cast<uint32_t>(plan.blocks_per_item));
  const uint32_t end =
      min(first_even_item(plan) + plan.items_per_block, static_cast<uint32_t>(plan.items));
  s.next = item + 1 < end ? item + 1 : kNone;
  s.first_block = blockIdx.y * plan.blocks_per_item;
  s.rank = blockIdx.x;
  s.blocks = blockIdx.x < blocks ? blocks : 0;
  s.from = 0, s.to = units;
  if (blocks > 1) {
    const Cut cut(units, blocks);
    s.from = cut.begin(blockIdx.x), s.to = cut.begin(blockIdx.x + 1);
  }
  return s;
}

// The segment of this block that `next` names. No blocks: there is none. All threads of a warp
// together.
__device__ inline Segment segment_at(const DecodeTask& task, uint32_t next) {
  Segment s;
  s.blocks = 0;
  if (next == kNone) return s;
  if (task.plan.blocks_per_item == 0) return segment_on_line(task, next);
  return even_segment(task, next);
}

}  // namespace tq::cuda
