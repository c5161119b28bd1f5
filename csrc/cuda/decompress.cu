// Which kernel decompresses: decompress_tiles.cu makes 16-bit numbers of the tuned head dims,
// decompress_general.cu the rest.
#include "codec.cuh"

namespace tq::cuda {

cudaError_t launch_decompress(const DecompressProblem& p, cudaStream_t stream) {
  if (p.B * p.H * p.S == 0) return cudaSuccess;
  return decompress_tiles_fit(p) ? launch_decompress_tiles(p, stream)
                                 : launch_decompress_general(p, stream);
}

}  // namespace tq::cuda
