// The Python face of the scan: checks what memory safety rests on, allocates the answer, releases the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "topk.hpp"

namespace py = pybind11;
namespace cpu = geoengine::cpu;

namespace {

constexpr int kNumpyHalf = 23;  // NPY_HALF of NumPy's C interface

bool is_half(const py::array& array) { return array.dtype().num() == kNumpyHalf && array.dtype().byteorder() == '='; }

void check_matrix(const py::array& array, const std::string& name, bool half_allowed) {
  if (!py::isinstance<py::array_t<float>>(array) && !(half_allowed && is_half(array))) {
    throw py::type_error(name + " must be float32" + (half_allowed ? " or float16" : "") + ", got " +
                         py::str(array.dtype()).cast<std::string>());
  }
  const int ready = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if (array.ndim() != 2 || (array.flags() & ready) != ready) {
    throw py::value_error(name + " must be a two-dimensional, aligned and C-contiguous array");
  }
}

const cpu::Kernel& find_kernel(const std::optional<std::string>& wanted) {
  if (!wanted) return *cpu::kernels().front();
  for (const cpu::Kernel* kernel : cpu::kernels()) {
    if (cpu::name(*kernel) == *wanted) return *kernel;
  }
  throw py::value_error("this processor has no kernel \"" + *wanted + "\"");
}

py::tuple cosine_topk(const py::array& embeddings, const py::array& queries, py::ssize_t k, py::ssize_t threads,
                      const std::optional<std::string>& kernel_name) {
  check_matrix(embeddings, "embeddings", true);
  check_matrix(queries, "queries", false);
  if (embeddings.shape(1) != queries.shape(1)) throw py::value_error("embeddings and queries differ in width");
  if (k < 1 || threads < 0) throw py::value_error("k must be at least 1 and threads at least 0");
  const cpu::Kernel& kernel = find_kernel(kernel_name);

  const py::ssize_t m = queries.shape(0);
  const py::ssize_t kept = std::min(k, embeddings.shape(0));
  py::array_t<float> scores({m, kept});
  py::array_t<std::int64_t> indices({m, kept});
  const cpu::Rows rows = {embeddings.data(), is_half(embeddings) ? cpu::RowType::f16 : cpu::RowType::f32,
                          embeddings.shape(0), embeddings.shape(1)};
  const cpu::Queries job = {static_cast<const float*>(queries.data()), m, kept, scores.mutable_data(),
                            indices.mutable_data()};
  cpu::Outcome outcome;
  {
    const py::gil_scoped_release released;
    outcome = cpu::cosine_topk(kernel, rows, job, threads);
  }
  if (outcome.status != cpu::Status::ok) {
    const std::string name = outcome.status == cpu::Status::bad_query ? "queries" : "embeddings";
    throw py::value_error(name + " must be finite, got NaN or infinity in row " + std::to_string(outcome.row));
  }
  return py::make_tuple(scores, indices);
}

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const cpu::Kernel* kernel : cpu::kernels()) names.push_back(cpu::name(*kernel));
  return names;
}

}  // namespace

PYBIND11_MODULE(_topk_cpu, module, py::mod_gil_not_used()) {
  module.doc() = "Cosine top-k on the CPU; call it through geoengine.kernels.";
  module.def("cosine_topk", &cosine_topk, py::arg("embeddings"), py::arg("queries"), py::arg("k"), py::kw_only(),
             py::arg("threads"), py::arg("kernel"),
             "Checked, C-contiguous arrays in; threads=0 chooses, kernel=None takes the fastest.");
  module.def("kernel_names", &kernel_names, "Kernels that this processor runs, fastest first.");
}
