// Which kernel compresses: compress_few.cu or compress_tiles.cu for 16-bit numbers of the tuned
// head dims in aligned rows without an offset, compress_general.cu for the rest.
#include "codec.cuh"

namespace tq::cuda {
namespace {

// So many numbers of a problem cost compress_few.cu as much as compress_tiles.cu pays for reading
// the rotation.
constexpr int64_t kFew = 1 << 16;

bool is_tuned(const CompressProblem& p) {
  return tuned_dim(p.D) && p.x.dtype != Dtype::f32 && !p.offset && aligned_rows(p.x, 2, 16) &&
         reinterpret_cast<uintptr_t>(p.rotation) % 16 == 0 && p.B * p.H * p.S < 1 << 30;
}

}  // namespace

cudaError_t launch_compress(const CompressProblem* problems, int count, cudaStream_t stream) {
  CompressProblems all = {};
  for (int i = 0; i < count; ++i) all.of[i] = problems[i];
  const int64_t vectors = all.of[0].B * all.of[0].H * all.of[0].S;
  if (vectors == 0) return cudaSuccess;
  bool tuned = true, tiles = true;
  for (int i = 0; i < count; ++i) {
    tuned = tuned && is_tuned(all.of[i]);
    tiles = tiles && compress_tiles_fit(all.of[i]);
  }
  if (tuned && vectors * all.of[0].D <= kFew) return launch_compress_few(all, count, stream);
  if (tuned && tiles) return launch_compress_tiles(all, count, stream);
  return launch_compress_general(all, count, stream);
}

}  // namespace tq::cuda
