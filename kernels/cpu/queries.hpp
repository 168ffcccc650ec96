// Queries made ready for the scan.
#pragma once

#include <cstdint>
#include <vector>

#include "topk.hpp"

namespace geoengine::cpu {

// Padded with zeros, and scaled by a power of two (exact) to a length near 1.
struct PreparedQueries {
  std::int64_t m;
  std::int64_t stride;
  std::vector<float> padded;        // [max(m, 1), stride]
  std::vector<float> inverse_norm;  // [max(m, 1)], of the scaled query; 0 for a zero query, so that its scores are 0
};

// Returns the first query that is not finite, or -1.
std::int64_t prepare(const Queries& queries, std::int64_t d, PreparedQueries& out);

// The queries of length 1 in int8, twice: factor * (first + second / kSecond) differs from the query by a vector no
// longer than `error`.
struct Int8Queries {
  static constexpr float kSecond = 254.0f;
  std::int64_t stride;
  std::vector<std::int8_t> planes;  // [m, 2, stride]
  std::vector<std::int32_t> sums;   // [m, 2]
  std::vector<float> factor;        // [m]
  std::vector<float> error;         // [m]
};

Int8Queries quantize(const PreparedQueries& queries, std::int64_t d);

}  // namespace geoengine::cpu
