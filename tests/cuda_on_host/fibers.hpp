// What a test may set.
#pragma once

#include <random>

namespace host_cuda {

extern std::mt19937 random_order;
extern int multiprocessors;
extern int shared_bytes_per_block;

}  // namespace host_cuda
