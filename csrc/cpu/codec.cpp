#include "codec.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "buffer.h"
#include "kernels.h"

namespace tq::cpu {
namespace {

// Whether no slot is written twice, as far as is cheap to tell.
bool distinct_slots(const CompressProblem& p) {
  if (!p.slot) return true;
  for (int64_t b = 0; b < p.B; ++b)
    for (int64_t s = 1; s < p.S; ++s)
      if (p.slot.at(b, s) <= p.slot.at(b, s - 1)) return false;
  return true;
}

// Vectors [begin, end) of the problem, numbered b, h, s with s fastest.
void compress_range(const CompressProblem& p, const float* panels, int64_t begin, int64_t end) {
  const Buffer scratch(compress_scratch(p.D));
  Strided x[kRowBlock], offset[kRowBlock];
  uint8_t* packed[kRowBlock];
  void* norms[kRowBlock];
  CompressTask task = {};
  task.D = p.D;
  task.x = x;
  task.offset = p.offset ? offset : nullptr;
  task.rotation_panels = panels;
  task.boundaries = p.boundaries;
  task.centroids = p.centroids;
  task.policy = p.policy;
  task.packed = packed;
  task.byte_stride = p.packed.stride[3];
  task.norms = norms;
  task.norm_dtype = p.norms.dtype;
  task.scratch = scratch.get();
  for (int64_t first = begin; first < end; first += kRowBlock) {
    task.rows = std::min<int64_t>(kRowBlock, end - first);
    for (int64_t r = 0; r < task.rows; ++r) {
      const int64_t i = first + r, s = i % p.S, h = i / p.S % p.H, b = i / p.S / p.H;
      const int64_t slot = p.slot ? p.slot.at(b, s) : s;
      x[r] = row(p.x, b, h, s);
      if (p.offset) offset[r] = row(p.offset, b, h, 0);
      packed[r] = slot < 0 ? nullptr : byte_row(p.packed, b, h, slot);
      norms[r] = slot < 0 ? nullptr : row_pointer(p.norms, size_of(p.norms.dtype), b, h, slot);
    }
    kernels().compress(task);
  }
}

}  // namespace

void compress(std::initializer_list<const CompressProblem*> problems) {
  for (const CompressProblem* p : problems) {
    const int64_t vectors = p->B * p->H * p->S;
    if (vectors == 0) continue;
    const Buffer panels = rotate_panels(p->rotation, p->D);
    // Two tokens for one slot must not race, and the later one wins: then a head is one unit.
    const int64_t unit = distinct_slots(*p) ? 1 : p->S;
    const int64_t grain = std::max<int64_t>(1, kGrain / (p->D * p->D * unit));
    torch::stable::parallel_for(0, vectors / unit, grain, [&](int64_t begin, int64_t end) {
      compress_range(*p, panels.get(), begin * unit, end * unit);
    });
  }
}

void decompress(const DecompressProblem& p) {
  const int64_t vectors = p.B * p.H * p.S;
  if (vectors == 0) return;
  const Buffer panels = unrotate_panels(p.rotation, p.D);
  const int64_t grain = std::max<int64_t>(kRowBlock, kGrain / (p.D * p.D));
  torch::stable::parallel_for(0, vectors, grain, [&](int64_t begin, int64_t end) {
    const Buffer scratch(decompress_scratch(p.D));
    const uint8_t* packed[kRowBlock];
    Strided norms[kRowBlock], offset[kRowBlock];
    void* x[kRowBlock];
    DecompressTask task = {};
    task.D = p.D;
    task.packed = packed;
    task.byte_stride = p.packed.stride[3];
    task.norms = norms;
    task.offset = p.offset ? offset : nullptr;
    task.rotation_panels = panels.get();
    task.centroids = p.centroids;
    task.x = x;
    task.dtype = p.x.dtype;
    task.scratch = scratch.get();
    for (int64_t first = begin; first < end; first += kRowBlock) {
      task.rows = std::min<int64_t>(kRowBlock, end - first);
      for (int64_t r = 0; r < task.rows; ++r) {
        const int64_t i = first + r, s = i % p.S, h = i / p.S % p.H, b = i / p.S / p.H;
        packed[r] = byte_row(p.packed, b, h, s);
        norms[r] = row(p.norms, b, h, s);
        if (p.offset) offset[r] = row(p.offset, b, h, 0);
        x[r] = row_pointer(p.x, size_of(p.x.dtype), b, h, s);
      }
      kernels().decompress(task);
    }
  });
}

}  // namespace tq::cpu
