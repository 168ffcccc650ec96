// The Python face of the CUDA kernels: checks what memory safety rests on as far as the host can see it, releases the
// GIL, and never waits for the device. Pointers are integers; the arrays behind them are the caller's.
#include <cuda_runtime_api.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>

#include "topk.hpp"

namespace py = pybind11;
namespace cuda = geoengine::cuda;

namespace {

void require(bool holds, const std::string& what) {
  if (!holds) throw py::value_error(what);
}

std::string error_text(cudaError_t error) {
  return std::string(cudaGetErrorName(error)) + " (" + cudaGetErrorString(error) + ")";
}

void check(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // the next call starts afresh
  throw std::runtime_error(std::string(doing) + ": " + error_text(error));
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::optional<std::string> driver_problem() {
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
    return "no NVIDIA driver was found: install one, or use arrays in CPU memory";
  }
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaErrorInsufficientDriver) {
    return "the NVIDIA driver knows CUDA " + version_text(driver) + " and this module was built with CUDA " +
           version_text(CUDART_VERSION) + ": update the driver, or rebuild with an older CUDA";
  }
  if (error == cudaErrorNoDevice || (error == cudaSuccess && count == 0)) {
    return "the NVIDIA driver sees no device: check nvidia-smi and CUDA_VISIBLE_DEVICES";
  }
  if (error != cudaSuccess) return error_text(error);
  return std::nullopt;
}

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

// Makes a device current and puts the caller's back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    if (const auto problem = driver_problem()) throw std::runtime_error("CUDA cannot be used: " + *problem);
    const int count = device_count();
    require(device >= 0 && device < count,
            "device must be in [0, " + std::to_string(count) + "), got " + std::to_string(device));
    check(cudaGetDevice(&previous_), "asking for the current device");
    if (device != previous_) check(cudaSetDevice(device), "choosing the device");
    changed_ = device != previous_;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
  bool changed_ = false;
};

cuda::Type type_of(const std::string& name, const char* argument, bool int8_allowed) {
  if (name == "float32") return cuda::Type::float32;
  if (name == "float16") return cuda::Type::float16;
  if (name == "bfloat16") return cuda::Type::bfloat16;
  if (name == "int8" && int8_allowed) return cuda::Type::int8;
  const char* const allowed = int8_allowed ? "float32, float16, bfloat16 or int8" : "float32, float16 or bfloat16";
  throw py::value_error(std::string(argument) + " must be " + allowed + ", got " + name);
}

void check_range(const char* name, std::int64_t value, std::int64_t least, std::int64_t most) {
  require(value >= least && value <= most, std::string(name) + " must be in [" + std::to_string(least) + ", " +
                                               std::to_string(most) + "], got " + std::to_string(value));
}

void check_sizes(const cuda::Problem& problem) {
  check_range("n", problem.n, 0, INT64_MAX);
  check_range("d", problem.d, 0, cuda::kWidest);
  check_range("m", problem.m, 0, cuda::kMostQueries);
  check_range("rows_count", problem.listed, 0, cuda::kMostListed);
  check_range("longest", problem.longest, 0, problem.listed);
  check_range("k", problem.k, 1, INT64_MAX);
}

void check_pointers(const cuda::Problem& problem) {
  check_range("row_stride", problem.row_stride, problem.n > 1 ? problem.d : 0, INT64_MAX);
  require(problem.row_numbers != nullptr || problem.listed == problem.n,
          "rows_count must be n where there are no rows");
  require(problem.segments != nullptr || problem.longest == problem.listed,
          "longest must be rows_count where there are no segments");
  require((problem.type == cuda::Type::int8) == (problem.scales != nullptr), "scales go with int8 embeddings alone");
  require(problem.rows != nullptr || problem.n * problem.d == 0, "embeddings must not be null");
  require(problem.queries != nullptr || problem.m * problem.d == 0, "queries must not be null");
}

template <typename T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void topk(int device, std::uintptr_t stream, const std::string& dtype, std::uintptr_t embeddings, std::int64_t n,
          std::int64_t d, std::int64_t row_stride, std::uintptr_t scales, std::uintptr_t queries,
          const std::string& query_dtype, std::int64_t m, std::uintptr_t rows, std::uintptr_t segments,
          std::int64_t rows_count, std::int64_t longest, std::int64_t k, bool normalized, std::uintptr_t scores,
          std::uintptr_t indices, std::uintptr_t workspace, std::size_t workspace_bytes) {
  cuda::Problem problem{};
  problem.type = type_of(dtype, "dtype", true);
  problem.rows = pointer<const void>(embeddings);
  problem.n = n;
  problem.d = d;
  problem.row_stride = row_stride;
  problem.scales = pointer<const float>(scales);
  problem.query_type = type_of(query_dtype, "query_dtype", false);
  problem.queries = pointer<const void>(queries);
  problem.m = m;
  problem.row_numbers = pointer<const std::int64_t>(rows);
  problem.segments = pointer<const std::int64_t>(segments);
  problem.listed = rows_count;
  problem.longest = longest;
  problem.k = k;
  problem.normalized = normalized;
  check_sizes(problem);
  check_pointers(problem);
  problem.k = k < longest ? k : longest;
  if (m == 0 || problem.k == 0) return;
  require(scores != 0 && indices != 0, "scores and indices must not be null");

  const py::gil_scoped_release released;
  const DeviceGuard guard(device);
  cuda::Device description{};
  check(cuda::describe(device, &description), "asking what the device can do");
  const std::size_t needed = cuda::workspace_bytes(problem, description);
  require(workspace != 0 && workspace % sizeof(std::uint64_t) == 0 && workspace_bytes >= needed,
          "workspace must hold " + std::to_string(needed) + " bytes from a multiple of 8 on, got " +
              std::to_string(workspace_bytes));
  check(cuda::topk(problem, description, pointer<void>(workspace), pointer<float>(scores),
                   pointer<std::int64_t>(indices), pointer<CUstream_st>(stream)),
        "starting the kernels");
}

// As topk will be called; the sizes without a name do not count.
std::size_t workspace_bytes(int device, const std::string& dtype, std::int64_t n, std::int64_t d, const std::string&,
                            std::int64_t m, bool, bool has_segments, std::int64_t rows_count, std::int64_t longest,
                            std::int64_t k, bool) {
  const std::int64_t some = 0;
  cuda::Problem problem{};
  problem.type = type_of(dtype, "dtype", true);
  problem.n = n;
  problem.d = d;
  problem.m = m;
  problem.segments = has_segments ? &some : nullptr;
  problem.listed = rows_count;
  problem.longest = longest;
  problem.k = k;
  check_sizes(problem);
  problem.k = k < longest ? k : longest;
  const py::gil_scoped_release released;
  const DeviceGuard guard(device);
  cuda::Device description{};
  check(cuda::describe(device, &description), "asking what the device can do");
  return cuda::workspace_bytes(problem, description);
}

// A pool of our own, which keeps what it has over synchronisations; the device's default pool is other libraries' too,
// and gives its memory back each time.
cudaMemPool_t pool_of(int device) {
  static std::mutex mutex;
  static std::map<int, cudaMemPool_t> pools;
  const std::lock_guard<std::mutex> lock(mutex);
  cudaMemPool_t& pool = pools[device];
  if (pool != nullptr) return pool;
  cudaMemPoolProps wanted{};
  wanted.allocType = cudaMemAllocationTypePinned;
  wanted.location.type = cudaMemLocationTypeDevice;
  wanted.location.id = device;
  check(cudaMemPoolCreate(&pool, &wanted), "making a memory pool");
  std::uint64_t kept = std::uint64_t{256} << 20;
  check(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &kept), "setting up a memory pool");
  return pool;
}

std::uintptr_t allocate(std::size_t bytes, int device, std::uintptr_t stream) {
  const py::gil_scoped_release released;
  const DeviceGuard guard(device);
  void* memory = nullptr;
  const std::string doing = "allocating " + std::to_string(bytes) + " bytes on the device";
  check(cudaMallocFromPoolAsync(&memory, bytes, pool_of(device), pointer<CUstream_st>(stream)), doing.c_str());
  return reinterpret_cast<std::uintptr_t>(memory);
}

void free_memory(std::uintptr_t address, int device, std::uintptr_t stream) {
  const py::gil_scoped_release released;
  const DeviceGuard guard(device);
  check(cudaFreeAsync(pointer<void>(address), pointer<CUstream_st>(stream)), "freeing device memory");
}

void wait(int device, std::uintptr_t stream, std::uintptr_t other) {
  const py::gil_scoped_release released;
  const DeviceGuard guard(device);
  cudaEvent_t event = nullptr;
  check(cudaEventCreateWithFlags(&event, cudaEventDisableTiming), "making an event");
  cudaError_t error = cudaEventRecord(event, pointer<CUstream_st>(stream));
  if (error == cudaSuccess) error = cudaStreamWaitEvent(pointer<CUstream_st>(other), event, 0);
  cudaEventDestroy(event);  // CUDA keeps it until it has happened
  check(error, "making one stream wait for another");
}

int device_of(std::uintptr_t address) {
  if (const auto problem = driver_problem()) throw std::runtime_error("CUDA cannot be used: " + *problem);
  cudaPointerAttributes attributes{};
  check(cudaPointerGetAttributes(&attributes, pointer<const void>(address)), "asking where memory lies");
  require(attributes.type == cudaMemoryTypeDevice || attributes.type == cudaMemoryTypeManaged,
          "the array must be in CUDA device memory");
  return attributes.device;
}

}  // namespace

PYBIND11_MODULE(_topk_cuda, module, py::mod_gil_not_used()) {
  module.doc() = "Cosine top-k on CUDA devices; call it through geoengine.kernels.";
  module.def("topk", &topk, py::kw_only(), py::arg("device"), py::arg("stream"), py::arg("dtype"),
             py::arg("embeddings"), py::arg("n"), py::arg("d"), py::arg("row_stride"), py::arg("scales"),
             py::arg("queries"), py::arg("query_dtype"), py::arg("m"), py::arg("rows"), py::arg("segments"),
             py::arg("rows_count"), py::arg("longest"), py::arg("k"), py::arg("normalized"), py::arg("scores"),
             py::arg("indices"), py::arg("workspace"), py::arg("workspace_bytes"),
             "Queue the kernels on `stream`: scores float32[m, min(k, longest)] and indices int64 of that shape.\n\n"
             "Pointers are device addresses, 0 for none; row_stride counts elements; longest bounds a segment.\n"
             "Raises ValueError for sizes that cannot be, RuntimeError with the name of the CUDA error.");
  module.def("workspace_bytes", &workspace_bytes, py::kw_only(), py::arg("device"), py::arg("dtype"), py::arg("n"),
             py::arg("d"), py::arg("query_dtype"), py::arg("m"), py::arg("has_rows"), py::arg("has_segments"),
             py::arg("rows_count"), py::arg("longest"), py::arg("k"), py::arg("normalized"),
             "Bytes of device memory that topk needs while it runs.");
  module.def("device_count", &device_count, "Number of CUDA devices; 0 without a driver.");
  module.def("driver_problem", &driver_problem, "Why CUDA cannot be used here, in words; None where it can.");
  module.def("device_of", &device_of, py::arg("pointer"), "The device whose memory a pointer is to.");
  module.def("allocate", &allocate, py::arg("bytes"), py::arg("device"), py::arg("stream"),
             "Address of new device memory, ready in the order of `stream`.");
  module.def("free", &free_memory, py::arg("pointer"), py::arg("device"), py::arg("stream"),
             "Free memory of allocate, in the order of `stream`.");
  module.def("wait", &wait, py::arg("device"), py::arg("stream"), py::arg("other"),
             "What is put on stream `other` from now on waits for what is on `stream` now; the host does not.");
}
