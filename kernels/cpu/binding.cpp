// The Python face of the scan: takes arrays that are ready, allocates the answer, releases the GIL. What is not ready
// gets None, and Python prepares it or says what is wrong: the words are written once, and the common call is short.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "dlpack.hpp"
#include "topk.hpp"

namespace py = pybind11;
namespace cpu = geoengine::cpu;

namespace {

// NumPy's type numbers, from its C interface.
constexpr int kInt8 = 1;
constexpr int kUInt16 = 4;
constexpr int kFloat32 = 11;
constexpr int kFloat16 = 23;

int type_number(const py::array& array) {
  const py::detail::PyArrayDescr_Proxy* const type = py::detail::array_descriptor_proxy(
      py::detail::array_proxy(array.ptr())->descr);
  return type->byteorder == '=' || type->byteorder == '|' ? type->type_num : -1;
}

bool has_flags(const py::array& array, int flags) { return (array.flags() & flags) == flags; }

constexpr int kReady = py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
constexpr int kReadyToWrite = kReady | py::detail::npy_api::NPY_ARRAY_WRITEABLE_;

bool is_vector_of_int64(const py::array& array) {
  return py::isinstance<py::array_t<std::int64_t>>(array) && array.ndim() == 1 && has_flags(array, kReady);
}

bool is_array(const py::object& object) { return py::isinstance<py::array>(object); }

bool read_floats(const py::object& object, std::int64_t n, const float*& out) {
  if (!py::isinstance<py::array_t<float>>(object)) return false;
  const auto array = py::reinterpret_borrow<py::array>(object);
  out = static_cast<const float*>(array.data());
  return array.ndim() == 1 && array.shape(0) == n && has_flags(array, kReady);
}

// Rows may lie apart, but the values of a row side by side.
bool read_rows(const py::object& object, const py::object& scales, bool bfloat16, bool unit, cpu::Rows& rows) {
  if (!is_array(object)) return false;
  const auto array = py::reinterpret_borrow<py::array>(object);
  const int type = type_number(array);
  if (type == kFloat32) {
    rows.type = cpu::RowType::f32;
  } else if (type == kFloat16) {
    rows.type = cpu::RowType::f16;
  } else if (type == kUInt16 && bfloat16) {
    rows.type = cpu::RowType::bf16;
  } else if (type == kInt8 && !scales.is_none()) {
    rows.type = cpu::RowType::i8;
  } else {
    return false;
  }
  if (array.ndim() != 2 || !has_flags(array, py::detail::npy_api::NPY_ARRAY_ALIGNED_)) return false;
  rows.data = array.data();
  rows.n = array.shape(0);
  rows.d = array.shape(1);
  rows.unit = unit;
  const py::ssize_t size = array.itemsize();
  rows.stride = rows.n > 1 ? array.strides(0) / size : rows.d;
  if (rows.n > 0 && rows.d > 1 && array.strides(1) != size) return false;
  if (rows.n > 1 && (array.strides(0) % size != 0 || rows.stride < rows.d)) return false;
  rows.scales = nullptr;
  if (rows.type == cpu::RowType::i8) {
    return read_floats(scales, rows.n, rows.scales);
  }
  return true;
}

// An Int8Rows whose four members are there.
bool read_look(const py::object& object, const cpu::Rows& rows, cpu::Int8Look& look) {
  if (!PyTuple_Check(object.ptr()) || PyTuple_GET_SIZE(object.ptr()) != 4) return false;
  const auto members = py::reinterpret_borrow<py::tuple>(object);
  cpu::Rows values;
  if (!read_rows(members[0], members[1], false, false, values) || values.type != cpu::RowType::i8) return false;
  if (values.n != rows.n || values.d != rows.d || rows.type == cpu::RowType::i8) return false;
  look.values = static_cast<const std::int8_t*>(values.data);
  look.stride = values.stride;
  look.scales = values.scales;
  return read_floats(members[2], rows.n, look.errors) && read_floats(members[3], rows.n, look.lengths);
}

bool read_candidates(const py::object& numbers, const py::object& segments, std::int64_t n, std::int64_t m,
                     cpu::Candidates& out) {
  out = {nullptr, n, nullptr, n};
  if (!numbers.is_none()) {
    if (!is_array(numbers)) return false;
    const auto array = py::reinterpret_borrow<py::array>(numbers);
    if (!is_vector_of_int64(array)) return false;
    out.rows = static_cast<const std::int64_t*>(array.data());
    out.count = out.longest = array.shape(0);
  }
  if (!segments.is_none()) {
    if (!is_array(segments)) return false;
    const auto array = py::reinterpret_borrow<py::array>(segments);
    if (!is_vector_of_int64(array) || array.shape(0) != m + 1) return false;
    out.segments = static_cast<const std::int64_t*>(array.data());
    if (out.segments[0] != 0 || out.segments[m] != out.count) return false;
    out.longest = 0;
    for (std::int64_t j = 0; j < m; ++j) {
      if (out.segments[j + 1] < out.segments[j]) return false;
      out.longest = std::max(out.longest, out.segments[j + 1] - out.segments[j]);
    }
  }
  return true;
}

// A Python integer of at least `least` that fits; a bool is none.
bool read_integer(const py::object& object, std::int64_t least, std::int64_t& out) {
  if (!PyLong_CheckExact(object.ptr())) return false;
  int overflow = 0;
  out = PyLong_AsLongLongAndOverflow(object.ptr(), &overflow);
  return overflow == 0 && out >= least;
}

// The caller's pair of arrays, or new ones.
bool read_out(const py::object& out, std::int64_t m, std::int64_t k, py::array& scores, py::array& indices) {
  if (out.is_none()) {
    scores = py::array_t<float>({m, k});
    indices = py::array_t<std::int64_t>({m, k});
    return true;
  }
  if (!PyTuple_CheckExact(out.ptr()) || PyTuple_GET_SIZE(out.ptr()) != 2) return false;
  const py::tuple pair = py::reinterpret_borrow<py::tuple>(out);
  if (!py::isinstance<py::array_t<float>>(pair[0]) || !py::isinstance<py::array_t<std::int64_t>>(pair[1])) return false;
  scores = pair[0];
  indices = pair[1];
  for (const py::array& array : {scores, indices}) {
    if (array.ndim() != 2 || array.shape(0) != m || array.shape(1) != k || !has_flags(array, kReadyToWrite)) {
      return false;
    }
  }
  return true;
}

const cpu::Kernel& find_kernel(const py::object& wanted) {
  if (wanted.is_none()) return *cpu::kernels().front();
  const std::string name = py::str(wanted);
  for (const cpu::Kernel* kernel : cpu::kernels()) {
    if (cpu::name(*kernel) == name) return *kernel;
  }
  throw py::value_error("this processor has no kernel \"" + name + "\"");
}

[[noreturn]] void refuse(const cpu::Outcome& outcome, const cpu::Candidates& candidates, std::int64_t n) {
  const std::string place = std::to_string(outcome.where);
  if (outcome.status == cpu::Status::bad_query) {
    throw py::value_error("queries must be finite, got NaN or infinity in row " + place);
  }
  const std::string row = candidates.rows ? std::to_string(candidates.rows[outcome.where]) : place;
  if (outcome.status == cpu::Status::no_such_row) {
    throw py::index_error("rows must be row numbers of embeddings, in [0, " + std::to_string(n) + "), got " + row +
                          " at position " + place);
  }
  throw py::value_error("embeddings must be finite, got NaN or infinity in row " + row);
}

py::object cosine_topk(const py::object& embeddings, const py::object& queries, const py::object& k,
                       const py::object& numbers, const py::object& segments, const py::object& normalized,
                       const py::object& out, const py::object& threads, const py::object& scales, bool bfloat16,
                       const py::object& scan, const py::object& kernel) {
  if (!PyBool_Check(normalized.ptr())) return py::none();
  cpu::Rows rows;
  if (!read_rows(embeddings, scales, bfloat16, normalized.ptr() == Py_True, rows)) return py::none();
  cpu::Int8Look look;
  if (!scan.is_none() && !read_look(scan, rows, look)) return py::none();
  if (!py::isinstance<py::array_t<float>>(queries)) return py::none();
  const auto photos = py::reinterpret_borrow<py::array>(queries);
  if (photos.ndim() != 2 || photos.shape(1) != rows.d || !has_flags(photos, kReady)) return py::none();
  cpu::Queries job;
  job.m = photos.shape(0);
  job.data = static_cast<const float*>(photos.data());
  cpu::Candidates candidates;
  if (!read_candidates(numbers, segments, rows.n, job.m, candidates)) return py::none();
  std::int64_t workers = 0;
  if (!read_integer(k, 1, job.k) || (!threads.is_none() && !read_integer(threads, 1, workers))) return py::none();
  job.k = std::min(job.k, candidates.longest);
  py::array scores;
  py::array indices;
  if (!read_out(out, job.m, job.k, scores, indices)) return py::none();
  job.scores = static_cast<float*>(scores.mutable_data());
  job.indices = static_cast<std::int64_t*>(indices.mutable_data());
  const cpu::Kernel& chosen = find_kernel(kernel);
  cpu::Outcome outcome;
  {
    const py::gil_scoped_release released;
    outcome = cpu::cosine_topk(chosen, rows, scan.is_none() ? nullptr : &look, candidates, job, workers);
  }
  if (outcome.status != cpu::Status::ok) refuse(outcome, candidates, rows.n);
  return py::make_tuple(std::move(scores), std::move(indices));
}

void quantize_rows(const py::array& embeddings, bool bfloat16, py::array_t<std::int8_t>& values,
                   py::array_t<float>& scales, py::array_t<float>& errors, py::array_t<float>& lengths) {
  cpu::Rows rows;
  if (!read_rows(embeddings, py::none(), bfloat16, false, rows)) throw py::value_error("embeddings are not ready");
  const bool sized = values.ndim() == 2 && values.shape(0) == rows.n && values.shape(1) == rows.d &&
                     scales.size() == rows.n && errors.size() == rows.n && lengths.size() == rows.n;
  for (const py::array& array : {py::array(values), py::array(scales), py::array(errors), py::array(lengths)}) {
    if (!sized || !has_flags(array, kReadyToWrite)) throw py::value_error("the answer has no room");
  }
  const cpu::Int8Out out = {values.mutable_data(), scales.mutable_data(), errors.mutable_data(),
                            lengths.mutable_data()};
  std::int64_t bad;
  {
    const py::gil_scoped_release released;
    bad = cpu::quantize_rows(rows, out);
  }
  if (bad >= 0) {
    throw py::value_error("embeddings must be finite, got NaN or infinity in row " + std::to_string(bad));
  }
}

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const cpu::Kernel* kernel : cpu::kernels()) names.push_back(cpu::name(*kernel));
  return names;
}

}  // namespace

PYBIND11_MODULE(_topk_cpu, module, py::mod_gil_not_used()) {
  module.doc() = "Cosine top-k on the CPU; call it through geoengine.kernels.";
  module.def("cosine_topk", &cosine_topk, py::arg("embeddings"), py::arg("queries"), py::arg("k"),
             py::arg("rows") = py::none(), py::arg("segments") = py::none(), py::arg("normalized") = false,
             py::arg("out") = py::none(), py::arg("threads") = py::none(),
             py::arg("scales") = py::none(), py::arg("bfloat16") = false, py::arg("scan") = py::none(),
             py::arg("kernel") = py::none(),
             "Arrays that are ready in, scores and indices out, or None where something is not ready; with bfloat16, "
             "embeddings of uint16 are the bits of bfloat16; kernel=None takes the fastest.");
  module.def("quantize_rows", &quantize_rows, py::arg("embeddings"), py::arg("bfloat16"), py::arg("values").noconvert(),
             py::arg("scales").noconvert(), py::arg("errors").noconvert(), py::arg("lengths").noconvert(),
             "Writes the rows in int8 to the other arrays.");
  module.def("read_dlpack", &cpu::read_dlpack, py::arg("capsule"),
             "(owner, pointer, shape, strides in elements, kind, bits, device type, device) of a DLPack capsule.");
  module.def("make_dlpack", &cpu::make_dlpack, py::arg("owner"), py::arg("pointer"), py::arg("shape"), py::arg("kind"),
             py::arg("bits"), py::arg("device_type"), py::arg("device"),
             "A DLPack capsule for C-contiguous memory that keeps its owner alive.");
  module.def("kernel_names", &kernel_names, "Kernels that this processor runs, fastest first.");
}
