// The Python module `turboquant._C`: the codebook and facts about this build, as plain Python and
// NumPy. It links neither torch nor CUDA.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "codebook.h"
#include "format.h"

namespace py = pybind11;

namespace {

void check_dim(int64_t dim) {
  if (!tq::valid_dim(dim))
    throw py::value_error("head dim must be even, from 16 to 512, got " + std::to_string(dim));
}

template <size_t N>
py::array_t<float> to_numpy(const std::array<float, N>& values) {
  return py::array_t<float>(N, values.data());
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Codebook and build facts of turboquant.";
  m.attr("__version__") = TQ_VERSION;
  m.attr("BUILT_WITH_TORCH") = TQ_TORCH_VERSION;
  m.attr("CUDA_ARCHS") = TQ_CUDA_ARCHS;
  m.attr("CUDA_REASON") = TQ_CUDA_REASON;

  m.def("check_dim", &check_dim, py::arg("dim"), "Raise ValueError for an unsupported head dim.");
  m.def(
      "codebook",
      [](int64_t dim) {
        check_dim(dim);
        const tq::Codebook book = tq::codebook(static_cast<int>(dim));
        return py::make_tuple(to_numpy(book.centroids), to_numpy(book.boundaries));
      },
      py::arg("dim"), "Centroids f32[16] and boundaries f32[15] for N(0, 1/dim).");
  m.def("pack", py::vectorize([](int even, int odd) { return tq::pack(even, odd); }),
        py::arg("even"), py::arg("odd"), "Two indices 0..15 to a byte; elementwise.");
  m.def("even_index", py::vectorize(&tq::even_index), py::arg("byte"));
  m.def("odd_index", py::vectorize(&tq::odd_index), py::arg("byte"));
}
