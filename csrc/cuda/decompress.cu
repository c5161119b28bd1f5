// Which kernel decompresses: decompress_tiles.cu makes 16-bit numbers of the tuned head dims in
// aligned rows, decompress_general.cu the rest.
#include "codec.cuh"

namespace tq::cuda {
namespace {

bool by_tiles(const DecompressProblem& p) {
  const int64_t vectors = p.B * p.H * p.S;
  return tuned_dim(p.D) && p.x.dtype != Dtype::f32 && aligned_rows(p.x, 2, 16) &&
         vectors < 1 << 30 && decompress_tiles_fit(p);
}

}  // namespace

int64_t decompress_workspace(const DecompressProblem& p) {
  return by_tiles(p) ? prepared_bytes(p.D) : 0;
}

cudaError_t launch_decompress(const DecompressProblem& p, void* workspace, cudaStream_t stream) {
  if (p.B * p.H * p.S == 0) return cudaSuccess;
  return by_tiles(p) ? launch_decompress_tiles(p, workspace, stream)
                     : launch_decompress_general(p, stream);
}

}  // namespace tq::cuda
