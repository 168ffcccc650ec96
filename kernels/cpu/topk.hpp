// Exact cosine top-k over rows in memory. Raw pointers only: the binding checks shapes, dtypes and k.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace geoengine::cpu {

enum class RowType { f32, f16 };

// A C-contiguous n x d matrix.
struct Rows {
  const void* data;
  RowType type;
  std::int64_t n;
  std::int64_t d;
};

// m x d queries in; m x k scores and row numbers out, best first, ties by lower row number. 1 <= k <= n, or n == k == 0.
struct Queries {
  const float* data;
  std::int64_t m;
  std::int64_t k;
  float* scores;
  std::int64_t* indices;
};

// What went wrong: `row` of the named matrix holds NaN or infinity, and nothing was written.
enum class Status { ok, bad_query, bad_row };
struct Outcome {
  Status status;
  std::int64_t row;
};

struct Kernel;

// Kernels that this processor runs, fastest first; the last one is always "portable".
const std::vector<const Kernel*>& kernels();
std::string name(const Kernel& kernel);

// threads == 0 chooses: the calling thread alone when starting others would cost more than it saves.
// The answer does not depend on threads, on the kernel, or on which other queries are in the call.
Outcome cosine_topk(const Kernel& kernel, const Rows& rows, const Queries& queries, std::int64_t threads);

}  // namespace geoengine::cpu
