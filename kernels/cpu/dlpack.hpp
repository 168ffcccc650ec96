// Tensors of other libraries, handed over by the DLPack protocol without a copy.
#pragma once

#include <pybind11/pybind11.h>

namespace geoengine::cpu {

// Takes a fresh "dltensor" capsule over and returns (owner, pointer, shape, strides in elements, kind, bits, device
// type, device number); the memory lives while `owner` does.
pybind11::tuple read_dlpack(const pybind11::object& capsule);

// A capsule for `pointer`, C-contiguous, that keeps `owner` alive until its consumer is done.
pybind11::capsule make_dlpack(pybind11::object owner, std::uintptr_t pointer, const std::vector<std::int64_t>& shape,
                              int kind, int bits, int device_type, int device);

}  // namespace geoengine::cpu
