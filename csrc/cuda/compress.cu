// Which kernel compresses: compress_few.cu or compress_tiles.cu for 16-bit numbers of the tuned
// head dims in aligned rows without an offset, compress_general.cu for the rest.
#include "codec.cuh"

namespace tq::cuda {
namespace {

// So many numbers of a problem cost compress_few.cu as much as compress_tiles.cu pays for reading
// the rotation.
constexpr int64_t kFew = 1 << 16;

enum class Kernel { few, tiles, general };

Kernel kernel_for(const CompressProblem& p) {
  const int64_t vectors = p.B * p.H * p.S;
  const bool tuned = tuned_dim(p.D) && p.x.dtype != Dtype::f32 && !p.offset &&
                     aligned_rows(p.x, 2, 16) &&
                     reinterpret_cast<uintptr_t>(p.rotation) % 16 == 0 && vectors < 1 << 30;
  if (tuned && vectors * p.D <= kFew) return Kernel::few;
  return tuned && compress_tiles_fit(p) ? Kernel::tiles : Kernel::general;
}

cudaError_t launch(Kernel kernel, const CompressProblems& problems, int count, void* workspace,
                   cudaStream_t stream) {
  switch (kernel) {
    case Kernel::few: return launch_compress_few(problems, count, stream);
    case Kernel::tiles: return launch_compress_tiles(problems, count, workspace, stream);
    default: return launch_compress_general(problems, count, stream);
  }
}

}  // namespace

int64_t compress_workspace(const CompressProblem* problems, int count) {
  for (int i = 0; i < count; ++i)
    if (kernel_for(problems[i]) == Kernel::tiles) return prepared_bytes(problems[i].D);
  return 0;
}

cudaError_t launch_compress(const CompressProblem* problems, int count, void* workspace,
                            cudaStream_t stream) {
  if (problems[0].B * problems[0].H * problems[0].S == 0) return cudaSuccess;
  const Kernel kernel = kernel_for(problems[0]);
  const CompressProblems first = {{problems[0]}};
  if (count == 1) return launch(kernel, first, 1, workspace, stream);

  // Each by the kernel that `compress` would choose for it: the same numbers get the same bits.
  const Kernel second_kernel = kernel_for(problems[1]);
  const CompressProblems both = {{problems[0], problems[1]}}, second = {{problems[1]}};
  if (kernel == second_kernel) return launch(kernel, both, 2, workspace, stream);
  const cudaError_t error = launch(kernel, first, 1, workspace, stream);
  return error == cudaSuccess ? launch(second_kernel, second, 1, workspace, stream) : error;
}

}  // namespace tq::cuda
