// What plain C++ has no words for. tests/cuda_on_host brings its own, to run the kernels without a GPU.
#pragma once

#include <cuda_runtime.h>

namespace geoengine::cuda {

#ifdef __CUDACC__

// The block's shared memory, as many bytes as the launch asked for.
__device__ inline unsigned char* block_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

// Waits for all threads of the cluster; what they wrote before, global memory included, is seen after. Code for devices
// without clusters is never launched.
__device__ inline void cluster_barrier() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __trap();
#endif
}

__device__ inline void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" ::"l"(address)); }

#endif

}  // namespace geoengine::cuda
