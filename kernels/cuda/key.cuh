// A candidate as one number: the better of two candidates has the larger key, so selection is on plain integers.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace geoengine::cuda {

// High word: the score in an order-preserving form, or 0 for a candidate without one (NaN or infinity in its row or
// query, or a row number outside the matrix). Low word: the complement of the position, so that ties go to the lower
// one. No two candidates of a list have the same key; shuffles and atomics want this type, not std::uint64_t.
using Key = unsigned long long;

// Less than every candidate's key, as positions stay below 2^32 - 1.
constexpr Key kNoKey = 0;

__host__ __device__ inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

__host__ __device__ inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

__host__ __device__ inline bool is_finite(float value) { return (bits_of(value) & 0x7f800000u) != 0x7f800000u; }

__host__ __device__ inline Key make_key(float score, std::uint32_t position) {
  std::uint32_t order = 0;
  if (is_finite(score)) {
    const std::uint32_t bits = bits_of(score == 0.0f ? 0.0f : score);  // -0 ties with 0
    order = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  }
  return static_cast<Key>(order) << 32 | static_cast<std::uint32_t>(~position);
}

// NaN for a candidate without a score, -infinity for no candidate.
__host__ __device__ inline float score_of(Key key) {
  if (key == kNoKey) return float_of(0xff800000u);
  const std::uint32_t order = static_cast<std::uint32_t>(key >> 32);
  if (order == 0) return float_of(0x7fc00000u);
  return float_of(order & 0x80000000u ? order ^ 0x80000000u : ~order);
}

__host__ __device__ inline std::int64_t position_of(Key key) {
  return key == kNoKey ? -1 : static_cast<std::int64_t>(static_cast<std::uint32_t>(~key));
}

__host__ __device__ inline int power_of_two_from(int value) {
  int power = 1;
  while (power < value) power *= 2;
  return power;
}

}  // namespace geoengine::cuda
