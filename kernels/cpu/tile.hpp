// The inner loops, written once over a vector type V of kLanes floats:
//   V::zero(), V::load(const T*), V::load(const T*, count < kLanes) with zeros after `count`,
//   fma(V, V, V), and sum_four(const V[4], float[4]), each adding lanes i and i+8, then i+4, i+2, i+1;
//   tile height V::rows and width V::queries, and height V::tall where there is one query; multiples of 4 or 1.
// Included by files that are compiled for different processors: everything here has internal linkage and no
// standard library function is used, so that the linker cannot share code between them.
#pragma once

#include <cstdint>

#include "kernel.hpp"
#include "numbers.hpp"

namespace geoengine::cpu {
namespace {

// Sums go to places that lie `stride` floats apart.
template <class V, int Count>
__attribute__((always_inline)) inline void sum_all(const V* sums, float* out, std::int64_t stride) {
  for (int i = 0; i < Count; i += 4) {
    V four[4];
    float totals[4];
    for (int j = 0; j < 4; ++j) four[j] = i + j < Count ? sums[i + j] : V::zero();
    sum_four(four, totals);
    for (int j = 0; j < 4 && i + j < Count; ++j) out[(i + j) * stride] = totals[j];
  }
}

// Asks for one cache line after the other while a tile is computed: memory is fastest read in order, which a tile of
// several rows does not do. Without `ahead`, asks for the same line again and again, which costs nothing.
class Ahead {
 public:
  Ahead(const void* from, std::int64_t ahead)
      : next_(static_cast<const char*>(from) + ahead), step_(ahead != 0 ? kLine : 0) {}

  // What follows lies `place` bytes into a step of the tile.
  void pass(std::int64_t place) {
    if (place % kLine != 0) return;
    __builtin_prefetch(next_);
    next_ += step_;
  }

 private:
  static constexpr std::int64_t kLine = 64;
  const char* next_;
  std::int64_t step_;
};

// R rows by Q queries in registers; row and query vectors are loaded once for R*Q products. `First` tiles of a row are
// those that find it in memory, not in the cache.
template <class V, class T, int R, int Q, bool Squares, bool First>
void score_tile(const void* const* rows, std::int64_t d, std::int64_t ahead, const float* queries, std::int64_t stride,
                float* products, std::int64_t products_stride, float* squares) {
  Ahead next(rows[0], ahead);
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
    for (int r = 0; r < R; ++r) {
      if constexpr (First) next.pass(r * kLanes * static_cast<std::int64_t>(sizeof(T)));
      row[r] = V::load(static_cast<const T*>(rows[r]) + column);
    }
    add(column, row);
  }
  if (column < d) {
    for (int r = 0; r < R; ++r) row[r] = V::load(static_cast<const T*>(rows[r]) + column, d - column);
    add(column, row);
  }
  if constexpr (Q == 1) {
    sum_all<V, R>(&product[0][0], products, products_stride);
  } else {
    for (int r = 0; r < R; ++r) sum_all<V, Q>(product[r], products + r * products_stride, 1);
  }
  if constexpr (Squares) sum_all<V, R>(square, squares, 1);
}

template <class V, class T, bool Squares>
void score_rows(const Strip& strip) {
  constexpr int R = V::rows;
  constexpr int Q = V::queries;
  constexpr int Tall = V::tall;
  static_assert(kStrip % R == 0 && kStrip % Tall == 0);
  if (strip.m == 1) {
    for (std::int64_t top = 0; top < strip.count; top += Tall) {
      score_tile<V, T, Tall, 1, Squares, true>(strip.rows + top, strip.d, strip.ahead, strip.queries, strip.stride,
                                               strip.products + top, 1, strip.squares + top);
    }
    return;
  }
  for (std::int64_t top = 0; top < strip.count; top += R) {
    const auto tile = [&](auto kernel, std::int64_t query) {
      kernel(strip.rows + top, strip.d, strip.ahead, strip.queries + query * strip.stride, strip.stride,
             strip.products + top * strip.m + query, strip.m, strip.squares + top);
    };
    std::int64_t query = 0;
    if (strip.m >= Q) {  // lengths once a row, with the first queries
      tile(score_tile<V, T, R, Q, Squares, true>, query);
      query += Q;
    } else {
      tile(score_tile<V, T, R, 1, Squares, true>, query);
      query += 1;
    }
    for (; query + Q <= strip.m; query += Q) tile(score_tile<V, T, R, Q, false, false>, query);
    for (; query < strip.m; ++query) tile(score_tile<V, T, R, 1, false, false>, query);
  }
}

template <class V, class T>
void score_strip(const Strip& strip) {
  if (strip.squares != nullptr) {
    score_rows<V, T, true>(strip);
  } else {
    score_rows<V, T, false>(strip);
  }
}

// Copies `count` values and pads with zeros, for instruction sets without masked loads.
template <class T, std::int64_t Length = kLanes>
struct Padded {
  alignas(64) T values[Length] = {};
  Padded(const T* from, std::int64_t count) {
    for (std::int64_t i = 0; i < count; ++i) values[i] = from[i];
  }
};

// Integer products over a vector type I: I::block bytes at a time, I::rows rows, I::Row of a row and I::Sum of sums:
//   I::zero(), I::load(const int8_t*), I::load(const int8_t*, count < I::block) with zeros after `count`,
//   I::add(Sum, Row, const int8_t* query), I::total(Sum); I::offset is what I::load adds to every byte.
template <class I>
void multiply_int8(const Int8Strip& strip) {
  constexpr int R = I::rows;
  static_assert(kStrip % R == 0 && kInt8Block % I::block == 0);
  for (std::int64_t top = 0; top < strip.count; top += R) {
    for (std::int64_t query = 0; query < strip.m; ++query) {
      const std::int8_t* const first = strip.queries + 2 * query * strip.stride;
      Ahead next(strip.rows[top], query == 0 ? strip.ahead : 0);
      typename I::Sum sums[2][R];
      for (int r = 0; r < R; ++r) sums[0][r] = sums[1][r] = I::zero();
      const auto add = [&](std::int64_t column, int r, const typename I::Row& row) {
        sums[0][r] = I::add(sums[0][r], row, first + column);
        sums[1][r] = I::add(sums[1][r], row, first + strip.stride + column);
      };
      std::int64_t column = 0;
      for (; column + I::block <= strip.d; column += I::block) {
        for (int r = 0; r < R; ++r) {
          next.pass(r * I::block);
          add(column, r, I::load(strip.rows[top + r] + column));
        }
      }
      if (column < strip.d) {
        for (int r = 0; r < R; ++r) add(column, r, I::load(strip.rows[top + r] + column, strip.d - column));
      }
      for (int plane = 0; plane < 2; ++plane) {
        std::int32_t* const products = strip.products + (2 * query + plane) * kStrip + top;
        const std::int32_t excess = I::offset * strip.sums[2 * query + plane];
        for (int r = 0; r < R; ++r) products[r] = I::total(sums[plane][r]) - excess;
      }
    }
  }
}

template <class V, class I>
constexpr Kernel make_kernel(const char* name) {
  return {name,
          score_strip<V, float>,
          score_strip<V, Half>,
          score_strip<V, BFloat16>,
          score_strip<V, std::int8_t>,
          multiply_int8<I>};
}

}  // namespace
}  // namespace geoengine::cpu
