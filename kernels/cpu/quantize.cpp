// Rows in int8, and how far they are from what they were made from.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "numbers.hpp"
#include "topk.hpp"

namespace geoengine::cpu {
namespace {

// Lengths within which fp32 holds scale and length to full precision.
constexpr double kShortest = 0x1p-60;
constexpr double kLongest = 0x1p60;

// Rounds up.
float float_above(double value) {
  const float nearest = static_cast<float>(value);
  return nearest < value ? std::nextafterf(nearest, std::numeric_limits<float>::infinity()) : nearest;
}

// Returns false when the row holds NaN or infinity.
bool quantize_row(const std::vector<double>& row, const Int8Out& out, std::int64_t i) {
  double square = 0.0;
  double largest = 0.0;
  for (const double value : row) {
    square += value * value;
    largest = std::max(largest, std::fabs(value));
  }
  if (!std::isfinite(square)) return false;
  const double length = std::sqrt(square);
  const float scale = static_cast<float>(largest / 127.0);
  const double inverse = scale > 0.0f ? 1.0 / scale : 0.0;
  std::int8_t* const values = out.values + i * static_cast<std::int64_t>(row.size());
  double rest = 0.0;
  for (std::size_t c = 0; c < row.size(); ++c) {
    const double rounded = std::clamp(std::nearbyint(row[c] * inverse), -127.0, 127.0);
    const double difference = row[c] - rounded * scale;
    rest += difference * difference;
    values[c] = static_cast<std::int8_t>(rounded);
  }
  out.scales[i] = scale;
  out.lengths[i] = static_cast<float>(std::min<double>(length, std::numeric_limits<float>::max()));
  const bool bounded = length == 0.0 || (length >= kShortest && length <= kLongest);
  // Room for the roundings of the sum in double.
  out.errors[i] = bounded ? float_above(std::sqrt(rest) * (1.0 + 0x1p-30)) : std::numeric_limits<float>::infinity();
  return true;
}

template <class T>
std::int64_t quantize_all(const Rows& rows, const Int8Out& out) {
  std::vector<double> row(static_cast<std::size_t>(rows.d));
  for (std::int64_t i = 0; i < rows.n; ++i) {
    const T* const values = static_cast<const T*>(rows.data) + i * rows.stride;
    for (std::size_t c = 0; c < row.size(); ++c) row[c] = widen(values[c]);
    if (!quantize_row(row, out, i)) return i;
  }
  return -1;
}

}  // namespace

std::int64_t quantize_rows(const Rows& rows, const Int8Out& out) {
  switch (rows.type) {
    case RowType::f32:
      return quantize_all<float>(rows, out);
    case RowType::f16:
      return quantize_all<Half>(rows, out);
    case RowType::bf16:
      return quantize_all<BFloat16>(rows, out);
    default:
      return quantize_all<std::int8_t>(rows, out);
  }
}

}  // namespace geoengine::cpu
