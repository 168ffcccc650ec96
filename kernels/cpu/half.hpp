// IEEE half precision in plain integer arithmetic.
#pragma once

#include <cstdint>
#include <cstring>

namespace geoengine::cpu {

static inline float half_to_float(std::uint16_t half) {
  const std::uint32_t sign = (half & 0x8000u) << 16;
  const std::uint32_t rest = half & 0x7fffu;
  if (rest < 0x0400u) {  // zero and subnormals: a multiple of 2^-24
    const float value = static_cast<float>(rest) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  // The exponent moves from bias 15 to bias 127; all ones (infinity, NaN) stays all ones.
  const std::uint32_t bits = sign | ((rest << 13) + (rest >= 0x7c00u ? 0x70000000u : 0x38000000u));
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace geoengine::cpu
