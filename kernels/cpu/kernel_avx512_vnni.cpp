// The same source, compiled for processors that also multiply bytes.
#include "kernel_avx512.cpp"
