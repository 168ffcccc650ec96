#include "kernel.hpp"
#include "topk.hpp"

namespace geoengine::cpu {

const std::vector<const Kernel*>& kernels() {
  static const std::vector<const Kernel*> available = [] {
    std::vector<const Kernel*> found;
#if defined(GEOENGINE_X86_KERNELS)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512vnni")) found.push_back(&avx512_vnni_kernel);
    if (avx512) found.push_back(&avx512_kernel);
    if (avx2) found.push_back(&avx2_kernel);
#elif defined(GEOENGINE_ARM_KERNELS)
    found.push_back(&neon_kernel);
#endif
    found.push_back(&portable_kernel);
    return found;
  }();
  return available;
}

std::string name(const Kernel& kernel) { return kernel.name; }

}  // namespace geoengine::cpu
