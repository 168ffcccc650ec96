// The inner loop, written once over a vector type V of kLanes floats:
//   V::zero(), V::load(const T*), V::load(const T*, count < kLanes) with zeros after `count`,
//   fma(V, V, V), sum(V) adding lanes i and i+8, then i+4, i+2, i+1; tile height V::rows and width V::queries.
// Included by files that are compiled for different processors: everything here has internal linkage and no
// standard library function is used, so that the linker cannot share code between them.
#pragma once

#include <cstdint>

#include "kernel.hpp"
#include "numbers.hpp"

namespace geoengine::cpu {
namespace {

// R rows by Q queries in registers; row and query vectors are loaded once for R*Q products.
template <class V, class T, int R, int Q, bool Squares>
void score_tile(const void* const* rows, std::int64_t d, const float* queries, std::int64_t stride, float* products,
                std::int64_t products_stride, float* squares) {
  V product[R][Q];
  V square[R];
  for (int r = 0; r < R; ++r) {
    square[r] = V::zero();
    for (int q = 0; q < Q; ++q) product[r][q] = V::zero();
  }
  const auto add = [&](std::int64_t column, const V* row) {
    for (int q = 0; q < Q; ++q) {
      const V query = V::load(queries + q * stride + column);
      for (int r = 0; r < R; ++r) product[r][q] = fma(row[r], query, product[r][q]);
    }
    if constexpr (Squares) {
      for (int r = 0; r < R; ++r) square[r] = fma(row[r], row[r], square[r]);
    }
  };
  V row[R];
  std::int64_t column = 0;
  for (; column + kLanes <= d; column += kLanes) {
    for (int r = 0; r < R; ++r) row[r] = V::load(static_cast<const T*>(rows[r]) + column);
    add(column, row);
  }
  if (column < d) {
    for (int r = 0; r < R; ++r) row[r] = V::load(static_cast<const T*>(rows[r]) + column, d - column);
    add(column, row);
  }
  for (int r = 0; r < R; ++r) {
    for (int q = 0; q < Q; ++q) products[r * products_stride + q] = sum(product[r][q]);
    if constexpr (Squares) squares[r] = sum(square[r]);
  }
}

template <class V, class T>
void score_strip(const Strip& strip) {
  constexpr int R = V::rows;
  constexpr int Q = V::queries;
  static_assert(kStrip % R == 0);
  for (std::int64_t top = 0; top < strip.count; top += R) {
    const auto tile = [&](auto kernel, std::int64_t query) {
      kernel(strip.rows + top, strip.d, strip.queries + query * strip.stride, strip.stride,
             strip.products + top * strip.m + query, strip.m, strip.squares + top);
    };
    std::int64_t query = 0;
    if (strip.squares != nullptr) {  // once a row, with the first queries
      if (strip.m >= Q) {
        tile(score_tile<V, T, R, Q, true>, query);
        query += Q;
      } else {
        tile(score_tile<V, T, R, 1, true>, query);
        query += 1;
      }
    }
    for (; query + Q <= strip.m; query += Q) tile(score_tile<V, T, R, Q, false>, query);
    for (; query < strip.m; ++query) tile(score_tile<V, T, R, 1, false>, query);
  }
}

// Copies `count` values and pads with zeros, for instruction sets without masked loads.
template <class T>
struct Padded {
  alignas(64) T values[kLanes] = {};
  Padded(const T* from, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) values[i] = from[i];
  }
};

template <class V>
constexpr Kernel make_kernel(const char* name) {
  return {name, score_strip<V, float>, score_strip<V, Half>, score_strip<V, BFloat16>, score_strip<V, std::int8_t>};
}

}  // namespace
}  // namespace geoengine::cpu
