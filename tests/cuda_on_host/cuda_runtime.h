// What a kernel sees of its thread: a fiber that others take turns with, at barriers and atomics, in a random order.
#pragma once

#include <cuda_runtime_api.h>

#include <cstring>
#include <functional>

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace host_cuda {

constexpr int kLanes = 32;

// Every lane gives 8 bytes and sees those of all lanes of its warp.
const std::uint64_t* exchange(std::uint64_t mine);
void run_grid(const cudaLaunchConfig_t& config, const std::function<void()>& thread);
bool wait_for_block(bool predicate);
void wait_for_cluster();
void maybe_yield();
unsigned char* shared_memory();

template <typename T>
T from_lane(T mine, int lane) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t));
  std::uint64_t bits = 0;
  std::memcpy(&bits, &mine, sizeof mine);
  bits = exchange(bits)[lane];
  std::memcpy(&mine, &bits, sizeof mine);
  return mine;
}

inline int lane() { return static_cast<int>(threadIdx.x) % kLanes; }

}  // namespace host_cuda

template <typename T>
T __shfl_sync(unsigned, T value, int source) {
  return host_cuda::from_lane(value, source);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return host_cuda::from_lane(value, host_cuda::lane() ^ mask);
}
inline unsigned __ballot_sync(unsigned, bool predicate) {
  const std::uint64_t* const all = host_cuda::exchange(predicate ? 1 : 0);
  unsigned mask = 0;
  for (int lane = 0; lane < host_cuda::kLanes; ++lane) mask |= static_cast<unsigned>(all[lane]) << lane;
  return mask;
}
inline void __syncthreads() { host_cuda::wait_for_block(false); }
inline int __syncthreads_or(int predicate) { return host_cuda::wait_for_block(predicate != 0) ? 1 : 0; }
inline unsigned atomicAdd(unsigned* address, unsigned value) {
  host_cuda::maybe_yield();
  const unsigned old = *address;
  *address += value;
  return old;
}
inline int __ffs(int value) { return __builtin_ffs(value); }
template <typename T>
T __ldg(const T* address) {
  if (reinterpret_cast<std::uintptr_t>(address) % sizeof(T) != 0) __builtin_trap();  // as the GPU would
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... given) {
  host_cuda::run_grid(*config, [&] { kernel(given...); });
  return cudaSuccess;
}

namespace geoengine::cuda {

inline unsigned char* block_memory() { return host_cuda::shared_memory(); }
inline void cluster_barrier() { host_cuda::wait_for_cluster(); }
inline void prefetch(const void*) {}

}  // namespace geoengine::cuda
