// The 16-bit floating-point formats, widened in plain integer arithmetic.
#pragma once

#include <cstdint>
#include <cstring>

namespace geoengine::cpu {

struct Half {
  std::uint16_t bits;
};

struct BFloat16 {
  std::uint16_t bits;
};

static inline float widen(float value) { return value; }

static inline float widen(std::int8_t value) { return value; }

static inline float widen(BFloat16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

static inline float widen(Half value) {
  const std::uint32_t sign = (value.bits & 0x8000u) << 16;
  const std::uint32_t rest = value.bits & 0x7fffu;
  if (rest < 0x0400u) {  // zero and subnormals: a multiple of 2^-24
    const float wide = static_cast<float>(rest) * 0x1p-24f;
    return sign != 0 ? -wide : wide;
  }
  // The exponent moves from bias 15 to bias 127; all ones (infinity, NaN) stays all ones.
  const std::uint32_t bits = sign | ((rest << 13) + (rest >= 0x7c00u ? 0x70000000u : 0x38000000u));
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

}  // namespace geoengine::cpu
