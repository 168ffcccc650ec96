#include "queries.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include "kernel.hpp"

namespace geoengine::cpu {
namespace {

// Partial sums, so that the compiler may use vectors: the order of the additions is fixed.
double squared_length(const float* query, std::int64_t d) {
  constexpr std::int64_t kSums = 8;
  double sums[kSums] = {};
  std::int64_t c = 0;
  for (; c + kSums <= d; c += kSums) {
    for (std::int64_t i = 0; i < kSums; ++i) sums[i] += static_cast<double>(query[c + i]) * query[c + i];
  }
  for (std::int64_t i = 0; c + i < d; ++i) sums[i] += static_cast<double>(query[c + i]) * query[c + i];
  double square = 0.0;
  for (const double sum : sums) square += sum;
  return square;
}

}  // namespace

std::int64_t prepare(const Queries& queries, std::int64_t d, PreparedQueries& out) {
  out.m = queries.m;
  out.stride = (d + kLanes - 1) / kLanes * kLanes;
  out.padded.assign(static_cast<std::size_t>(std::max<std::int64_t>(queries.m, 1) * out.stride), 0.0f);
  out.inverse_norm.assign(static_cast<std::size_t>(std::max<std::int64_t>(queries.m, 1)), 0.0f);
  for (std::int64_t j = 0; j < queries.m; ++j) {
    const float* const query = queries.data + j * d;
    const double square = squared_length(query, d);
    if (!std::isfinite(square)) return j;
    if (square == 0.0) continue;
    const int exponent = std::ilogb(std::sqrt(square));
    const double scale = std::ldexp(1.0, -exponent);
    float* const scaled = out.padded.data() + j * out.stride;
    for (std::int64_t c = 0; c < d; ++c) scaled[c] = static_cast<float>(query[c] * scale);
    out.inverse_norm[static_cast<std::size_t>(j)] = static_cast<float>(std::ldexp(1.0, exponent) / std::sqrt(square));
  }
  return -1;
}

Int8Queries quantize(const PreparedQueries& queries, std::int64_t d) {
  Int8Queries out;
  const auto m = static_cast<std::size_t>(queries.m);
  out.stride = (d + kInt8Block - 1) / kInt8Block * kInt8Block;
  out.planes.assign(m * 2 * static_cast<std::size_t>(out.stride), 0);
  out.sums.assign(m * 2, 0);
  out.factor.assign(m, 0.0f);
  out.error.assign(m, 0.0f);
  for (std::size_t j = 0; j < m; ++j) {
    const float* const query = queries.padded.data() + static_cast<std::int64_t>(j) * queries.stride;
    const double length = std::sqrt(squared_length(query, d));
    double largest = 0.0;
    for (std::int64_t c = 0; c < d; ++c) largest = std::max(largest, std::fabs(query[c] / length));
    if (!(largest > 0.0)) continue;
    const float factor = static_cast<float>(largest / 127.0);
    std::int8_t* const first = out.planes.data() + static_cast<std::int64_t>(2 * j) * out.stride;
    std::int8_t* const second = first + out.stride;
    double square = 0.0;
    for (std::int64_t c = 0; c < d; ++c) {
      const double value = query[c] / length / factor;
      const double whole = std::clamp(std::nearbyint(value), -127.0, 127.0);
      const double part = std::clamp(std::nearbyint((value - whole) * Int8Queries::kSecond), -127.0, 127.0);
      const double rest = (value - whole - part / Int8Queries::kSecond) * factor;
      square += rest * rest;
      first[c] = static_cast<std::int8_t>(whole);
      second[c] = static_cast<std::int8_t>(part);
      out.sums[2 * j] += first[c];
      out.sums[2 * j + 1] += second[c];
    }
    out.factor[j] = factor;
    // Room for the rounding in double and to float.
    out.error[j] = static_cast<float>(std::sqrt(square) * (1.0 + 0x1p-20) + 0x1p-40);
  }
  return out;
}

}  // namespace geoengine::cpu
