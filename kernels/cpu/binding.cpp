#include <pybind11/pybind11.h>

PYBIND11_MODULE(_topk_cpu, m) { m.doc() = "Cosine top-k on the CPU."; }
