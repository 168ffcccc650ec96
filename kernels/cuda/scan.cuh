// Scores of rows, computed by warps from rows in global and queries in shared memory.
#pragma once

#include "device.cuh"
#include "plan.hpp"
#include "rows.cuh"
#include "select.cuh"

namespace geoengine::cuda {

// What a launch is given.
struct Scan {
  Problem problem;
  int padded;
  int capacity;
  int k;                // answers of this pass
  std::int64_t parts;
  std::int64_t tiles;
  const Key* bounds;    // [m]: only keys below count, in passes after the first; else null
  Key* partial;         // [m, k, parts]: the parts' best, theirs first
  Key* next_bounds;     // [m]
  float* scores;        // this pass's first column of [m, answers]
  std::int64_t* indices;
  std::int64_t answers;
};

// Squared lengths in fp32 are trusted when finite and at least this: then no product has overflowed, and what has
// underflowed is far below rounding. Other rows (zero, tiny, huge, not finite) are computed again in double.
constexpr float kSmallestSquare = 0x1p-60f;

// A query's candidates: positions 0 to length - 1 of a list that starts at `begin`.
struct List {
  std::int64_t begin;
  unsigned length;
};

// Segments are clamped to the list they index: what the device holds cannot be checked without waiting for it.
__device__ inline List list_of(const Problem& problem, int query) {
  if (problem.segments == nullptr) return {0, static_cast<unsigned>(problem.listed)};
  std::int64_t begin = problem.segments[query];
  std::int64_t end = problem.segments[query + 1];
  begin = begin < 0 ? 0 : begin > problem.listed ? problem.listed : begin;
  end = end < begin ? begin : end > problem.listed ? problem.listed : end;
  return {begin, static_cast<unsigned>(end - begin)};
}

// The row at a position of the list, or -1 for a row number outside the matrix.
__device__ inline std::int64_t row_at(const Problem& problem, const List& list, unsigned position) {
  std::int64_t row = list.begin + position;
  if (problem.row_numbers != nullptr) row = problem.row_numbers[row];
  return row >= 0 && row < problem.n ? row : -1;
}

// The queries of a block, in shared memory.
struct Tile {
  float* values;   // [queries, padded] in the order of query_slot, scaled by a power of two to a length near 1
  float* inverse;  // of the scaled length; 0 for a query of zeros, NaN for one that is not finite
  Key* bounds;
  Key* keys;       // [queries, capacity]
  Key* thresholds;
  unsigned* counts;
  int first;
  int queries;
};

template <int kQueries>
__device__ inline Tile tile_in_shared_memory(const Scan& scan, int first) {
  Tile tile;
  tile.thresholds = reinterpret_cast<Key*>(block_memory());
  tile.bounds = tile.thresholds + kQueries;
  tile.inverse = reinterpret_cast<float*>(tile.bounds + kQueries);
  tile.counts = reinterpret_cast<unsigned*>(tile.inverse + kQueries);
  tile.values = reinterpret_cast<float*>(block_memory() + header_bytes(kQueries));
  tile.keys = reinterpret_cast<Key*>(tile.values + kQueries * scan.padded);
  tile.first = first;
  const int left = static_cast<int>(scan.problem.m) - first;
  tile.queries = left < kQueries ? left : kQueries;
  return tile;
}

__device__ inline Selector selector_of(const Scan& scan, const Tile& tile, int query, int turn) {
  return {tile.keys + query * scan.capacity,
          tile.thresholds + query,
          tile.counts + query,
          scan.capacity,
          turn,
          scan.k};
}

__device__ inline float query_value(const Problem& problem, int query, int column) {
  const std::int64_t at = static_cast<std::int64_t>(query) * problem.d + column;
  switch (problem.query_type) {
    case Type::float16: return value_at<Float16>(static_cast<const std::uint16_t*>(problem.queries) + at, 0);
    case Type::bfloat16: return value_at<BFloat16>(static_cast<const std::uint16_t*>(problem.queries) + at, 0);
    default: return value_at<Float32>(static_cast<const float*>(problem.queries) + at, 0);
  }
}

// One warp brings one query to shared memory. A power of two scales exactly.
template <typename T>
__device__ inline void stage_query(const Scan& scan, const Tile& tile, int query, int lane) {
  const int d = static_cast<int>(scan.problem.d);
  float* const values = tile.values + query * scan.padded;
  const bool real = query < tile.queries;
  double square = 0.0;
  for (int column = lane; real && column < d; column += kWarp) {
    const double x = query_value(scan.problem, tile.first + query, column);
    square += x * x;
  }
  square = warp_sum(square);
  const bool finite = square * 0.0 == 0.0;
  const int exponent = finite && square > 0.0 ? ilogb(sqrt(square)) : 0;
  for (int column = lane; column < scan.padded; column += kWarp) {
    const float x = real && column < d ? query_value(scan.problem, tile.first + query, column) : 0.0f;
    values[query_slot<T>(column)] = ldexpf(x, -exponent);
  }
  if (lane == 0) {
    tile.inverse[query] = !finite        ? float_of(0x7fc00000u)
                          : square > 0.0 ? static_cast<float>(ldexp(1.0, exponent) / sqrt(square))
                                         : 0.0f;
    tile.bounds[query] = scan.bounds != nullptr && real ? scan.bounds[tile.first + query] : ~kNoKey;
    tile.counts[query] = 0;
    tile.thresholds[query] = kNoKey;
  }
}

// Asks for the bytes of kRows rows, a line of 128 per lane at a time.
template <typename T>
__device__ inline void prefetch_rows(const Scan& scan, const List& list, unsigned first, unsigned end, int lane) {
  constexpr std::int64_t kLine = 128;
  const std::int64_t bytes = scan.problem.d * static_cast<std::int64_t>(sizeof(typename T::Stored));
  for (unsigned r = 0; r < kRows && first + r < end; ++r) {
    const std::int64_t row = row_at(scan.problem, list, first + r);
    if (row < 0) continue;
    const auto* const start = static_cast<const typename T::Stored*>(scan.problem.rows) + row * scan.problem.row_stride;
    for (std::int64_t byte = lane * kLine; byte < bytes; byte += kWarp * kLine) {
      prefetch(reinterpret_cast<const unsigned char*>(start) + byte);
    }
  }
}

// The dot products of kRows rows (null: a row of zeros) with the block's queries and the rows' squares, each lane over
// its own columns. products[i][j] is of row p / kQueries and query p % kQueries with p = 32 i + j.
template <typename T, int kQueries, bool kAligned, int kAhead, int kSets, int kSet>
__device__ inline void multiply(const Scan& scan, const float* values, const typename T::Stored* const (&rows)[kRows],
                                int lane, float (&products)[kSets][kSet], float (&squares)[kRows]) {
  const int d = static_cast<int>(scan.problem.d);
#pragma unroll 1
  for (int base = 0; base < scan.padded; base += kAhead * kStrip<T>) {
    std::uint32_t words[kAhead][kRows][4];
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        load<T, kAligned>(rows[r], base + ahead * kStrip<T> + lane * kVector<T>, d, words[ahead][r]);
      }
    }
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
      const int strip = base + ahead * kStrip<T>;
      if (strip >= scan.padded) break;
#pragma unroll
      for (int slice = 0; slice < kVector<T> / 4; ++slice) {
        float x[kRows][4];
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          T::unpack(words[ahead][r], slice, x[r]);
#pragma unroll
          for (int i = 0; i < 4; ++i) squares[r] = fmaf(x[r][i], x[r][i], squares[r]);
        }
#pragma unroll
        for (int q = 0; q < kQueries; ++q) {
          const int at = q * scan.padded + strip + slice * 4 * kWarp + lane * 4;
          const float4 y = *reinterpret_cast<const float4*>(values + at);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            float& sum = products[(r * kQueries + q) / kSet][(r * kQueries + q) % kSet];
            sum = fmaf(x[r][0], y.x, sum);
            sum = fmaf(x[r][1], y.y, sum);
            sum = fmaf(x[r][2], y.z, sum);
            sum = fmaf(x[r][3], y.w, sum);
          }
        }
      }
    }
  }
}

// Dot product over row length, in double; not finite if the row is not. All lanes take part and get the answer.
template <typename T>
__device__ inline float product_in_double(const Scan& scan, const float* values, const typename T::Stored* row,
                                          int lane) {
  double product = 0.0;
  double square = 0.0;
#pragma unroll 1  // rare: better small than fast
  for (int column = lane; column < static_cast<int>(scan.problem.d); column += kWarp) {
    const double x = value_at<T>(row, column);
    product += x * values[query_slot<T>(column)];
    square += x * x;
  }
  product = warp_sum(product);
  square = warp_sum(square);
  return square == 0.0 ? 0.0f : static_cast<float>(product / sqrt(square));
}

// An int8 row is scale times values: the scale turns the cosine's sign at most, and takes part where lengths are given.
__device__ inline float apply_scale(float product, float scale, bool normalized) {
  if (!is_finite(scale)) return float_of(0x7fc00000u);
  if (normalized) return product * scale;
  return scale > 0.0f ? product : scale < 0.0f ? -product : product * 0.0f;
}

__device__ inline float clamp_cosine(float score) {
  return score > 1.0f ? 1.0f : score < -1.0f ? -1.0f : score;  // NaN stays
}

// One lane's candidate: the product of one row, over its length if that counts, with the scaled query q of the block.
struct Candidate {
  float product;
  unsigned position;
  int q;
  bool missing;  // no such row
};

// Pushes a candidate that may be among the best; true when the block's buffer is full enough to be sorted.
__device__ inline bool offer(const Scan& scan, const Tile& tile, const List& list, const Candidate& candidate,
                             int turn) {
  const Problem& problem = scan.problem;
  float score = float_of(0x7fc00000u);
  if (!candidate.missing) {
    score = candidate.product;
    if (problem.scales != nullptr) {
      score = apply_scale(score, problem.scales[row_at(problem, list, candidate.position)], problem.normalized);
    }
    score *= tile.inverse[candidate.q];
    if (!problem.normalized) score = clamp_cosine(score);
  }
  const Key key = make_key(score, candidate.position);
  if (key <= tile.thresholds[candidate.q] || key >= tile.bounds[candidate.q]) return false;
  return push(selector_of(scan, tile, candidate.q, turn), key);
}

// Scores kRows candidates from `first` on and offers them. One warp, whole.
template <typename T, int kQueries, bool kAligned, int kAhead>
__device__ inline bool score_rows(const Scan& scan, const Tile& tile, const List& list, unsigned first,
                                  unsigned end, int turn, int lane) {
  const Problem& problem = scan.problem;
  const auto* const matrix = static_cast<const typename T::Stored*>(problem.rows);
  const typename T::Stored* rows[kRows];
  unsigned missing = 0;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const std::int64_t row = first + r < end ? row_at(problem, list, first + r) : -1;
    rows[r] = row < 0 ? nullptr : matrix + row * problem.row_stride;
    missing |= (row < 0 ? 1u : 0u) << r;
  }

  constexpr int kSet = kRows * kQueries < kWarp ? kRows * kQueries : kWarp;
  constexpr int kSets = kRows * kQueries / kSet;
  float products[kSets][kSet] = {};
  float squares[kRows] = {};
  multiply<T, kQueries, kAligned, kAhead>(scan, tile.values, rows, lane, products, squares);

  const float square = sums_to_lanes(squares, lane);  // of row lane % kRows
  const bool trusted = problem.normalized || (square >= kSmallestSquare && is_finite(square));
  const unsigned again = __ballot_sync(kWholeWarp, !trusted) & ((1u << kRows) - 1) & ~missing;
  bool full = false;
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
    const int pair = set * kSet + lane % kSet;
    const int r = pair / kQueries;
    const int q = pair % kQueries;
    float product = sums_to_lanes(products[set], lane);
    const float row_square = __shfl_sync(kWholeWarp, square, r);
    if (!problem.normalized) product /= sqrtf(row_square);
    for (unsigned left = again; left != 0; left &= left - 1) {
      const int untrusted = __ffs(static_cast<int>(left)) - 1;
      const std::int64_t row = row_at(problem, list, first + untrusted);
      for (int query = 0; query < kQueries; ++query) {
        const float* const values = tile.values + query * scan.padded;
        const float exact = product_in_double<T>(scan, values, matrix + row * problem.row_stride, lane);
        if (r == untrusted && q == query) product = exact;
      }
    }
    if (lane < kSet && first + r < end && q < tile.queries) {
      full |= offer(scan, tile, list, {product, first + r, q, (missing >> r & 1u) != 0}, turn);
    }
  }
  return full;
}

}  // namespace geoengine::cuda
