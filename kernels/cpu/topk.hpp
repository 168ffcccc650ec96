// Exact cosine top-k over rows in memory. Raw pointers only: the binding checks shapes, dtypes and k.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace geoengine::cpu {

enum class RowType { f32, f16, bf16, i8 };

// An n x d matrix whose rows begin `stride` elements apart. Rows of type i8 have a scale each: row i is
// scales[i] * values. Where `unit` is set the caller vouches for length 1, and scores are products, not cosines.
struct Rows {
  const void* data;
  RowType type;
  std::int64_t n;
  std::int64_t d;
  std::int64_t stride;
  const float* scales;
  bool unit;
};

// The same rows in int8, as `quantize_rows` makes them: row i differs from scales[i] * values by a vector no longer
// than errors[i], and its length is lengths[i].
struct Int8Look {
  const std::int8_t* values;
  std::int64_t stride;
  const float* scales;
  const float* errors;
  const float* lengths;
};

// Where `quantize_rows` writes: values is n x d without gaps.
struct Int8Out {
  std::int8_t* values;
  float* scales;
  float* errors;
  float* lengths;
};

// Which rows are scored. `rows` are `count` row numbers, or null: all rows in order, and count == n. `segments` are
// m + 1 ascending positions from 0 to count, query j's list lying between the j-th and the next; or null: one list
// for all queries. `longest` is the length of the longest list.
struct Candidates {
  const std::int64_t* rows;
  std::int64_t count;
  const std::int64_t* segments;
  std::int64_t longest;
};

// m x d queries in; m x k scores and positions in the query's list out, best first, ties by lower position. k <=
// `longest`, and 1 <= k where there is anything to score; a shorter list is filled with -infinity and -1.
struct Queries {
  const float* data;
  std::int64_t m;
  std::int64_t k;
  float* scores;
  std::int64_t* indices;
};

// What went wrong: query `where`, or the row at position `where` of the candidates, holds NaN or infinity, or the row
// number there does not exist. Nothing was written.
enum class Status { ok, bad_query, bad_row, no_such_row };
struct Outcome {
  Status status;
  std::int64_t where;
};

struct Kernel;

// Kernels that this processor runs, fastest first; the last one is always "portable".
const std::vector<const Kernel*>& kernels();
std::string name(const Kernel& kernel);

// threads == 0 chooses: the calling thread alone when starting others would cost more than it saves.
// A score does not depend on threads, on the kernel, or on what else is in the call. With a `look` at them, rows that
// cannot be among the k best are not read in full; the answer is the same.
Outcome cosine_topk(const Kernel& kernel, const Rows& rows, const Int8Look* look, const Candidates& candidates,
                    const Queries& queries, std::int64_t threads);

// Returns the first row that is not finite, or -1.
std::int64_t quantize_rows(const Rows& rows, const Int8Out& out);

}  // namespace geoengine::cpu
