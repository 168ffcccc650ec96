#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dlpack.hpp"

namespace py = pybind11;

namespace geoengine::cpu {
namespace {

// The protocol's C structures, https://dmlc.github.io/dlpack/latest/c_api.html, before version 1.0 of it.
struct DLDevice {
  std::int32_t type;
  std::int32_t number;
};
struct DLDataType {
  std::uint8_t kind;
  std::uint8_t bits;
  std::uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  std::int32_t ndim;
  DLDataType dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};

constexpr const char* kFresh = "dltensor";
constexpr const char* kUsed = "used_dltensor";

void release(DLManagedTensor* managed) {
  if (managed != nullptr && managed->deleter != nullptr) managed->deleter(managed);
}

// What a capsule of ours points into; the consumer's deleter may run on any thread.
struct Export {
  DLManagedTensor managed;
  std::vector<std::int64_t> shape;
  py::object owner;
};

void delete_export(DLManagedTensor* managed) {
  const py::gil_scoped_acquire held;
  delete static_cast<Export*>(managed->context);
}

}  // namespace

py::tuple read_dlpack(const py::object& capsule) {
  auto* const managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), kFresh));
  if (managed == nullptr || PyCapsule_SetName(capsule.ptr(), kUsed) != 0) throw py::error_already_set();
  const py::capsule owner(managed, [](void* pointer) { release(static_cast<DLManagedTensor*>(pointer)); });
  const DLTensor& tensor = managed->tensor;
  const auto ndim = static_cast<std::size_t>(tensor.ndim);
  std::vector<std::int64_t> shape(tensor.shape, tensor.shape + ndim);
  std::vector<std::int64_t> strides(ndim, 1);
  for (std::size_t i = ndim; i-- > 0;) {
    if (tensor.strides != nullptr) {
      strides[i] = tensor.strides[i];
    } else if (i + 1 < ndim) {
      strides[i] = strides[i + 1] * shape[i + 1];
    }
  }
  const auto pointer = reinterpret_cast<std::uintptr_t>(tensor.data) + static_cast<std::uintptr_t>(tensor.byte_offset);
  const int bits = tensor.dtype.bits * tensor.dtype.lanes;
  return py::make_tuple(owner, pointer, py::tuple(py::cast(shape)), py::tuple(py::cast(strides)),
                        static_cast<int>(tensor.dtype.kind), bits, tensor.device.type, tensor.device.number);
}

py::capsule make_dlpack(py::object owner, std::uintptr_t pointer, const std::vector<std::int64_t>& shape, int kind,
                        int bits, int device_type, int device) {
  auto made = std::make_unique<Export>();
  made->shape = shape;
  made->owner = std::move(owner);
  const DLDataType dtype = {static_cast<std::uint8_t>(kind), static_cast<std::uint8_t>(bits), 1};
  made->managed.tensor = {reinterpret_cast<void*>(pointer),
                          {device_type, device},
                          static_cast<std::int32_t>(made->shape.size()),
                          dtype,
                          made->shape.data(),
                          nullptr,
                          0};
  made->managed.context = made.get();
  made->managed.deleter = delete_export;
  PyObject* const capsule = PyCapsule_New(&made->managed, kFresh, [](PyObject* unused) {
    if (PyCapsule_IsValid(unused, kFresh)) release(static_cast<DLManagedTensor*>(PyCapsule_GetPointer(unused, kFresh)));
  });
  if (capsule == nullptr) throw py::error_already_set();
  made.release();
  return py::reinterpret_steal<py::capsule>(capsule);
}

}  // namespace geoengine::cpu
