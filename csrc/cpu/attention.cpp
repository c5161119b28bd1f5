#include "attention.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../softmax.h"
#include "buffer.h"
#include "dispatch.h"
#include "prefill.h"

namespace tq::cpu {
namespace {

// The G query heads of one KV head times Lq tokens are `rows` of one problem, row i·G + g, so that
// each packed byte is expanded once for all of them. A block is up to kMaxRows rows; the keys it
// sees are cut into splits, so that few rows over a long context still occupy all threads.
struct Block {
  int64_t b, h;         // batch row, KV head
  int64_t first, rows;  // rows [first, first + rows) of the head
  int64_t key_begin, key_end;
  int64_t splits;

  int64_t split(int64_t i) const {  // where split i begins
    return key_begin + (key_end - key_begin) * i / splits;
  }
};

// A split costs a partial result of rows · D floats; it should read well more than that.
constexpr int64_t kKeysPerSplit = 1024;
// All splits of one head together hold at most this many partial rows.
constexpr int64_t kPartialRows = 256;

// Does not depend on the number of threads or on Lkv: results are the same bits for any of them.
int64_t splits_for(int64_t keys, int64_t rows_per_head) {
  const int64_t by_keys = (keys + kKeysPerSplit - 1) / kKeysPerSplit;
  return std::clamp<int64_t>(by_keys, 1, std::max<int64_t>(1, kPartialRows / rows_per_head));
}

// What attend() leaves behind for each split of a block.
struct Partials {
  float* data;
  int64_t rows, width;

  static int64_t size(int64_t splits, int64_t rows, int64_t width) {
    return splits * rows * (width + 2);
  }
  float* max(int64_t split) const { return data + size(split, rows, width); }
  float* sum(int64_t split) const { return max(split) + rows; }
  float* out(int64_t split) const { return sum(split) + rows; }
};

class Attention {
 public:
  explicit Attention(const AttentionProblem& problem)
      : p(problem),
        group(p.Hq / p.Hkv),
        rows_per_head(p.Lq * group),
        width(expanded_dim(p.D)),
        tiles(tiles_for(p, rows_per_head)),
        query(p.B * p.Hkv * rows_per_head * p.D),
        unrotate(unrotate_panels(p.rotation, p.D)) {}

  void run() {
    rotate_queries();
    const std::vector<Block> blocks = make_blocks();
    const auto partials_size = [&](const Block& block) {
      return Partials::size(block.splits, block.rows, width);
    };

    // Where there are several splits, all splits of all blocks side by side.
    struct Split {
      const Block* block;
      int64_t index;
    };
    std::vector<Split> splits;
    std::vector<int64_t> offset;  // of each block's partials
    int64_t total = 0;
    if (std::any_of(blocks.begin(), blocks.end(), [](const Block& b) { return b.splits > 1; })) {
      for (const Block& block : blocks) {
        offset.push_back(total);
        if (block.splits == 1) continue;
        total += partials_size(block);
        for (int64_t i = 0; i < block.splits; ++i) splits.push_back({&block, i});
      }
    }
    const Buffer shared(total);
    const auto partials = [&](const Block& block) {
      return Partials{shared + offset[&block - blocks.data()], block.rows, width};
    };
    torch::stable::parallel_for(0, splits.size(), 1, [&](int64_t begin, int64_t end) {
      const Buffer scratch(attend_size());
      for (int64_t i = begin; i < end; ++i)
        attend(*splits[i].block, splits[i].index, partials(*splits[i].block), scratch.get());
    });

    // Merge those; blocks that are one split run from start to end.
    const int64_t keys = std::max<int64_t>(1, blocks[0].key_end - blocks[0].key_begin);
    const int64_t grain = std::max<int64_t>(1, kGrain / (blocks[0].rows * p.D * keys));
    torch::stable::parallel_for(0, blocks.size(), grain, [&](int64_t begin, int64_t end) {
      const int64_t used = std::max(attend_size(), finish_scratch());
      const Buffer scratch(used + Partials::size(1, kMaxRows, width));
      for (int64_t i = begin; i < end; ++i) {
        const Block& block = blocks[i];
        Partials own = {scratch + used, block.rows, width};
        if (block.splits == 1)
          attend(block, 0, own, scratch.get());
        else
          own = partials(block);
        finish(block, own, scratch.get());
      }
    });
  }

 private:
  const AttentionProblem& p;
  const int64_t group, rows_per_head, width;
  const Attend tiles;  // attend() on the matrix units, or null
  const Buffer query;  // [B, Hkv, rows_per_head, D], rotated, times the scale
  const Buffer unrotate;

  void rotate_queries() {
    const Buffer panels = rotate_panels(p.rotation, p.D);
    const int64_t padded = round_up(p.D, kPanel), total = p.B * p.Hkv * rows_per_head;
    const int64_t grain = std::max<int64_t>(kRowBlock, kGrain / (p.D * p.D));
    torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
      const int64_t most = std::min<int64_t>(kRowBlock, end - begin);
      const Buffer scratch(most * (p.D + padded));
      float* in = scratch.get();
      float* rotated = scratch + most * p.D;
      for (int64_t first = begin; first < end; first += kRowBlock) {
        const int64_t rows = std::min<int64_t>(kRowBlock, end - first);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t n = first + r, head_row = n % rows_per_head, head = n / rows_per_head;
          const Strided from =
              row(p.query, head / p.Hkv, query_head(head % p.Hkv, head_row), head_row / group);
          kernels().load(in + r * p.D, from, p.D);
        }
        kernels().gemm(rows, padded / kPanel, p.D, in, p.D, panels.get(), p.D * kPanel, rotated,
                       padded, false);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t d = 0; d < p.D; ++d)
            query.get()[(first + r) * p.D + d] = rotated[r * padded + d] * p.scale;
      }
    });
  }

  int64_t query_head(int64_t kv_head, int64_t head_row) const {
    return kv_head * group + head_row % group;
  }

  // Row `head_row` of batch row b sees keys below this.
  int64_t limit(int64_t b, int64_t head_row) const {
    const int64_t length = p.length(b);
    return p.causal ? std::max<int64_t>(0, length - p.Lq + head_row / group + 1) : length;
  }

  std::vector<Block> make_blocks() const {
    std::vector<Block> blocks;
    for (int64_t b = 0; b < p.B; ++b) {
      const int64_t start = p.start(b);
      for (int64_t h = 0; h < p.Hkv; ++h) {
        for (int64_t first = 0; first < rows_per_head; first += kMaxRows) {
          const int64_t rows = std::min<int64_t>(kMaxRows, rows_per_head - first);
          const int64_t end = limit(b, first + rows - 1);  // the last row sees the most
          const int64_t begin = std::min(start, end);
          blocks.push_back({b, h, first, rows, begin, end, splits_for(end - begin, rows_per_head)});
        }
      }
    }
    return blocks;
  }

  static PackedHead packed_head(const View& packed, const View& norms, int64_t b, int64_t h) {
    Strided norm = row(norms, b, h, 0);
    norm.stride = norms.stride[2];
    return {byte_row(packed, b, h, 0), packed.stride[2], packed.stride[3], norm};
  }

  void attend(const Block& block, int64_t split, const Partials& to, float* scratch) const {
    AttendTask task = {};
    task.rows = block.rows;
    task.D = p.D;
    task.q = query + ((block.b * p.Hkv + block.h) * rows_per_head + block.first) * p.D;
    task.k = packed_head(p.k_packed, p.k_norms, block.b, block.h);
    task.v = packed_head(p.v_packed, p.v_norms, block.b, block.h);
    task.centroids = p.centroids;
    task.first = block.split(split);
    task.last = block.split(split + 1);
    task.start = p.start(block.b);
    int64_t limits[kMaxRows];
    const uint8_t* mask[kMaxRows];
    for (int64_t r = 0; r < block.rows; ++r) {
      limits[r] = limit(block.b, block.first + r);
      if (p.mask) mask[r] = byte_row(p.mask, block.b, 0, (block.first + r) / group);
    }
    task.limit = limits;
    task.mask = p.mask ? mask : nullptr;
    task.mask_stride = p.mask.stride[3];
    task.softcap = p.softcap;
    task.scratch = scratch;
    task.max = to.max(split);
    task.sum = to.sum(split);
    task.out = to.out(split);
    (tiles ? tiles : kernels().attend)(task);
  }

  // One row of float32 arithmetic is as fast, and so are short vectors: tiles pad them to 128.
  static Attend tiles_for(const AttentionProblem& p, int64_t rows_per_head) {
    const bool suited = p.query.dtype == Dtype::bf16 && p.D >= 64 && rows_per_head > 1 &&
                        p.k_packed.stride[3] == 1 && p.v_packed.stride[3] == 1;
    return suited ? amx() : nullptr;
  }
  int64_t attend_size() const {
    const int64_t rows = std::min<int64_t>(kMaxRows, rows_per_head);
    return tiles ? amx_scratch(rows, p.D) : attend_scratch(p.D);
  }
  int64_t finish_scratch() const { return kMaxRows * (width + round_up(p.D, kPanel)); }

  // Merge a block's splits, divide, rotate back, store.
  void finish(const Block& block, const Partials& partials, float* scratch) const {
    float* merged = scratch;                 // [rows][width]
    float* out = merged + kMaxRows * width;  // [rows][D padded]
    const int64_t padded = round_up(p.D, kPanel);
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t hq = query_head(block.h, block.first + r), i = (block.first + r) / group;
      SoftmaxState state;
      float* sum = merged + r * width;
      std::fill(sum, sum + width, 0.0f);
      for (int64_t s = 0; s < block.splits; ++s) {
        float factor;
        const float own = state.merge({partials.max(s)[r], partials.sum(s)[r]}, &factor);
        const float* part = partials.out(s) + r * width;
        for (int64_t d = 0; d < width; ++d) sum[d] = sum[d] * own + part[d] * factor;
      }
      if (p.sinks) {
        float sink;
        kernels().load(&sink, row(p.sinks, 0, hq, 0), 1);
        const float own = state.sink(sink);
        for (int64_t d = 0; d < width; ++d) sum[d] *= own;
      }
      const float scale = state.scale();
      for (int64_t d = 0; d < width; ++d) sum[d] *= scale;
      if (p.lse) p.lse[(block.b * p.Hq + hq) * p.Lq + i] = state.lse();
    }
    kernels().gemm(block.rows, padded / kPanel, width, merged, width, unrotate.get(),
                   width * kPanel, out, padded, false);
    for (int64_t r = 0; r < block.rows; ++r) {
      const int64_t hq = query_head(block.h, block.first + r), i = (block.first + r) / group;
      const int64_t size = size_of(p.out.dtype);
      auto* to = static_cast<char*>(row_pointer(p.out, size, block.b, hq, i));
      const float* from = out + r * padded;
      if (p.out.stride[3] == 1) {
        kernels().store(to, p.out.dtype, from, p.D);
      } else {
        for (int64_t d = 0; d < p.D; ++d)
          kernels().store(to + d * p.out.stride[3] * size, p.out.dtype, from + d, 1);
      }
    }
  }
};

}  // namespace

void attention(const AttentionProblem& problem) {
  if (problem.B == 0 || problem.Hq == 0 || problem.Lq == 0) return;
  if (prefill_applies(problem)) return prefill(problem);
  Attention(problem).run();
}

}  // namespace tq::cpu
