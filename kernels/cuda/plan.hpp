// How a problem is cut into blocks. Host code without a CUDA call.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "key.cuh"
#include "select.cuh"
#include "topk.hpp"

namespace geoengine::cuda {

constexpr int kRows = 4;             // that a warp scores together
constexpr int kPass = 1024;          // answers found in one pass over the rows
constexpr int kClusterBlocks = 8;    // the largest cluster that every device with clusters takes
constexpr int kClusterLongest = 4096;
constexpr int kMergeThreads = 1024;

// How a block works. A thread has 64 registers in a cluster's block, 80 with one query and 128 with more.
template <int kQueries, bool kCluster>
struct Shape {
  static constexpr int kThreads = kCluster ? 1024 : 256;
  static constexpr int kBlocks = kCluster ? 1 : kQueries == 1 ? 3 : 2;  // that a multiprocessor must have room for
  static constexpr int kSteps = kCluster || kQueries == 1 ? 4 : 1;      // groups of rows per warp between two barriers
  static constexpr int kTurn = kThreads / 32 * kRows * kSteps;
};

struct Plan {
  int queries;        // per block: 1 or 8
  bool aligned;       // rows can be read 16 bytes at a time
  bool cluster;       // one launch; else a scan and a merge
  int padded;         // width of a query in shared memory
  int capacity;       // keys kept per query
  int turn;
  int threads;
  int blocks;         // side by side on a multiprocessor, as far as registers go
  std::int64_t parts;  // that each list is cut into
  std::int64_t tiles;  // of queries
  std::size_t shared_bytes;
};

inline int bytes_per_value(Type type) { return type == Type::float32 ? 4 : type == Type::int8 ? 1 : 2; }

inline bool rows_aligned(const Problem& problem) {
  const std::int64_t vector = 16 / bytes_per_value(problem.type);
  return reinterpret_cast<std::uintptr_t>(problem.rows) % 16 == 0 && problem.d % vector == 0 &&
         (problem.row_stride % vector == 0 || problem.n <= 1);
}

// Shared memory of a block: for each query threshold, bound, inverse length and number of keys; then the values of the
// queries from a multiple of 16 bytes on; then their keys.
__host__ __device__ constexpr int header_bytes(int queries) {
  return (queries * static_cast<int>(2 * sizeof(Key) + sizeof(float) + sizeof(unsigned)) + 15) / 16 * 16;
}

inline std::size_t shared_bytes(int queries, int capacity, int padded) {
  const int per_query = static_cast<int>(sizeof(Key)) * capacity + static_cast<int>(sizeof(float)) * padded;
  return static_cast<std::size_t>(header_bytes(queries) + queries * per_query);
}

template <int kQueries, bool kCluster>
void shape_into(Plan& plan, int k) {
  using Chosen = Shape<kQueries, kCluster>;
  plan.queries = kQueries;
  plan.cluster = kCluster;
  plan.turn = Chosen::kTurn;
  plan.threads = Chosen::kThreads;
  plan.blocks = Chosen::kBlocks;
  plan.capacity = selector_capacity(k, plan.turn);
  plan.shared_bytes = shared_bytes(kQueries, plan.capacity, plan.padded);
}

// How long a list is taken to be where the host does not know: any guess gives the same answer.
inline std::int64_t expected_length(const Problem& problem) {
  if (problem.segments == nullptr) return problem.listed;
  return std::max<std::int64_t>(std::min(problem.longest, 2 * problem.listed / problem.m), 1);
}

// Many queries over the same rows share a block, so that rows are read once for all of them, as far as memory allows.
inline void choose_shape(Plan& plan, const Problem& problem, const Device& device, int k) {
  const auto limit = static_cast<std::size_t>(device.shared_bytes_per_block);
  const bool shared_rows = plan.aligned && problem.segments == nullptr;
  const bool short_lists = expected_length(problem) <= kClusterLongest && (!shared_rows || problem.m <= 16);
  if (device.clusters && plan.aligned && short_lists) return shape_into<1, true>(plan, k);
  if (shared_rows && problem.m > 1) {
    shape_into<8, false>(plan, k);
    if (plan.shared_bytes <= limit) return;
  }
  shape_into<1, false>(plan, k);
}

// One wave of blocks for short lists; four for long ones, as memory does not serve all multiprocessors equally fast.
inline std::int64_t choose_parts(const Plan& plan, const Problem& problem, const Device& device, int k) {
  constexpr std::int64_t kFewestRows = 128;
  constexpr std::int64_t kManyRows = 2048;
  constexpr std::int64_t kMostPartialBytes = std::int64_t{64} << 20;
  const auto block_bytes = static_cast<std::int64_t>(plan.shared_bytes) + 1024;  // CUDA takes 1 KiB for itself
  const std::int64_t fitting = device.shared_bytes_per_multiprocessor / block_bytes;
  const std::int64_t resident = device.multiprocessors * std::clamp<std::int64_t>(fitting, 1, plan.blocks);
  const std::int64_t wave = std::max<std::int64_t>(resident / plan.tiles, 1);
  const std::int64_t length = expected_length(problem);
  std::int64_t parts = std::min(wave, (length + kFewestRows - 1) / kFewestRows);
  parts = std::max(parts, std::min(4 * wave, length / kManyRows));
  const std::int64_t bytes_per_part = problem.m * k * static_cast<std::int64_t>(sizeof(Key));
  return std::max<std::int64_t>(std::min(parts, kMostPartialBytes / bytes_per_part), 1);
}

inline int answers_per_pass(const Problem& problem) {
  return static_cast<int>(std::min<std::int64_t>(problem.k, kPass));
}

// For a problem with m, longest and k of at least 1.
inline Plan make_plan(const Problem& problem, const Device& device, bool aligned) {
  Plan plan{};
  plan.aligned = aligned;
  const int strip = 32 * 16 / bytes_per_value(problem.type);
  plan.padded = static_cast<int>((problem.d + strip - 1) / strip * strip);
  const int k = answers_per_pass(problem);
  choose_shape(plan, problem, device, k);
  plan.tiles = (problem.m + plan.queries - 1) / plan.queries;
  plan.parts = plan.cluster ? kClusterBlocks : choose_parts(plan, problem, device, k);
  return plan;
}

// Partial answers, then a bound per query for the next pass.
inline std::size_t plan_bytes(const Problem& problem, const Plan& plan) {
  const std::int64_t keys = problem.m * answers_per_pass(problem) * plan.parts + problem.m;
  return static_cast<std::size_t>(keys) * sizeof(Key);
}

}  // namespace geoengine::cuda
