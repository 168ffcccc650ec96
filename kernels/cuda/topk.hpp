// Exact cosine top-k over rows in device memory. Raw pointers and a stream; nothing here waits for the device.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace geoengine::cuda {

enum class Type { float32, float16, bfloat16, int8 };

// The limits that the binding checks: positions fit in 32 bits with a block's turn to spare, a query fits in shared
// memory, the grid in one dimension.
constexpr std::int64_t kMostListed = 0xfffff000;
constexpr std::int64_t kWidest = 8192;
constexpr std::int64_t kMostQueries = std::int64_t{1} << 27;

struct Problem {
  Type type;
  const void* rows;           // [n, d]; row i starts at element i * row_stride
  std::int64_t n;
  std::int64_t d;             // <= kWidest
  std::int64_t row_stride;
  const float* scales;        // [n] with int8 rows, else null
  Type query_type;            // not int8
  const void* queries;        // [m, d], contiguous
  std::int64_t m;             // <= kMostQueries
  const std::int64_t* row_numbers;  // [listed], or null: position i is row i
  const std::int64_t* segments;     // [m + 1], or null: one list for all queries
  std::int64_t listed;        // <= kMostListed
  std::int64_t longest;       // no segment has more rows; `listed` without segments
  std::int64_t k;             // answers per query, <= longest
  bool normalized;
};

// What the launches depend on.
struct Device {
  int multiprocessors;
  int shared_bytes_per_block;
  int shared_bytes_per_multiprocessor;
  bool clusters;  // can start the single-launch kernel, which wants clusters of eight blocks
};

cudaError_t describe(int device, Device* description);

// Bytes of workspace that `topk` needs at most, whatever the alignment of the rows.
std::size_t workspace_bytes(const Problem& problem, const Device& device);

// Writes scores [m, k] and indices [m, k]: best first, ties by lower position, candidates without a score (NaN or
// infinity in a row or query, row number outside [0, n)) last with score NaN; past the end of a short list score
// -infinity and index -1. An index is a position in the query's list. The answer does not depend on m or on the device.
// More than 1024 answers are found 1024 at a time, each time in one more pass over the rows.
cudaError_t topk(const Problem& problem, const Device& device, void* workspace, float* scores, std::int64_t* indices,
                 cudaStream_t stream);

}  // namespace geoengine::cuda
