// Which kernel compresses: compress_few.cu or compress_tiles.cu for 16-bit numbers of the tuned
// head dims in aligned rows without an offset, compress_general.cu for the rest.
#include "codec.cuh"

namespace tq::cuda {
namespace {

// So many numbers of a problem cost compress_few.cu as much as compress_tiles.cu pays for reading
// the rotation.
constexpr int64_t kFew = 1 << 16;

using Launch = decltype(launch_compress_general);

Launch* kernel_for(const CompressProblem& p) {
  const int64_t vectors = p.B * p.H * p.S;
  const bool tuned = tuned_dim(p.D) && p.x.dtype != Dtype::f32 && !p.offset &&
                     aligned_rows(p.x, 2, 16) &&
                     reinterpret_cast<uintptr_t>(p.rotation) % 16 == 0 && vectors < 1 << 30;
  if (tuned && vectors * p.D <= kFew) return launch_compress_few;
  if (tuned && compress_tiles_fit(p)) return launch_compress_tiles;
  return launch_compress_general;
}

}  // namespace

cudaError_t launch_compress(const CompressProblem* problems, int count, cudaStream_t stream) {
  if (problems[0].B * problems[0].H * problems[0].S == 0) return cudaSuccess;
  Launch* const launch = kernel_for(problems[0]);
  const CompressProblems first = {{problems[0]}};
  if (count == 1) return launch(first, 1, stream);

  // Each by the kernel that `compress` would choose for it: the same numbers get the same bits.
  Launch* const second_launch = kernel_for(problems[1]);
  const CompressProblems both = {{problems[0], problems[1]}}, second = {{problems[1]}};
  if (launch == second_launch) return launch(both, 2, stream);
  const cudaError_t error = launch(first, 1, stream);
  return error == cudaSuccess ? second_launch(second, 1, stream) : error;
}

}  // namespace tq::cuda
