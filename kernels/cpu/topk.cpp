#include "topk.hpp"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <thread>

#include "best.hpp"
#include "kernel.hpp"
#include "pool.hpp"
#include "queries.hpp"
#include "scan.hpp"

namespace geoengine::cpu {
namespace {

// Waking a thread costs about as much as this many multiply-adds.
constexpr double kProductsPerThread = 4e6;

// With fewer, a thread costs more than it saves even if it is awake.
constexpr double kFewestProducts = 4e5;

struct Crew {
  std::int64_t threads;
  double brief;  // the number of products, where they are few
};

Crew choose_threads(const Rows& rows, const Candidates& candidates, std::int64_t m, std::int64_t asked) {
  const std::int64_t strips = std::max<std::int64_t>((candidates.count + kStrip - 1) / kStrip, 1);
  if (asked > 0) return {std::min(asked, strips), 0.0};
  const double pairs = static_cast<double>(candidates.count) * static_cast<double>(candidates.segments ? 1 : m);
  const double products = pairs * static_cast<double>(rows.d);
  if (products < kFewestProducts) return {1, 0.0};
  static const std::int64_t cores = std::max(1u, std::thread::hardware_concurrency());  // it reads a file each time
  if (products < 2 * kProductsPerThread) return {std::min({cores, strips, std::int64_t{2}}), products};
  const double most = std::min(products / kProductsPerThread, static_cast<double>(std::min(cores, strips)));
  return {static_cast<std::int64_t>(most), 0.0};
}

// The k best of all workers' bests, in order.
void merge(const std::vector<Worker>& workers, const Queries& queries) {
  std::vector<Scored> scored;
  for (std::int64_t j = 0; j < queries.m; ++j) {
    scored.clear();
    for (const Worker& worker : workers) {
      if (worker.best.empty()) continue;  // its thread did not come
      const std::vector<Scored>& kept = worker.best[static_cast<std::size_t>(j)].kept();
      scored.insert(scored.end(), kept.begin(), kept.end());
    }
    const auto k = static_cast<std::size_t>(queries.k);
    keep_best(scored, k);
    std::sort(scored.begin(), scored.end(), better);
    const auto place = static_cast<std::size_t>(j) * k;
    for (std::size_t i = 0; i < k; ++i) {
      const bool filled = i < scored.size();
      queries.scores[place + i] = filled ? scored[i].score : -std::numeric_limits<float>::infinity();
      queries.indices[place + i] = filled ? scored[i].row : -1;
    }
  }
}

}  // namespace

Outcome cosine_topk(const Kernel& kernel, const Rows& rows, const Int8Look* look, const Candidates& candidates,
                    const Queries& queries, std::int64_t threads) {
  PreparedQueries prepared;
  const std::int64_t bad_query = prepare(queries, rows.d, prepared);
  if (bad_query >= 0) return {Status::bad_query, bad_query};
  if (candidates.count == 0) return {Status::ok, 0};

  const Crew crew = choose_threads(rows, candidates, queries.m, threads);
  Scan scan(kernel, rows, look, candidates, prepared, queries.k, crew.threads);
  run_together(scan, crew.threads - 1, crew.brief);

  std::int64_t bad = candidates.count;
  for (const Worker& worker : scan.workers()) {
    if (worker.error) std::rethrow_exception(worker.error);
    if (worker.bad_position >= 0) bad = std::min(bad, worker.bad_position);
  }
  if (bad < candidates.count) return {scan.exists(bad) ? Status::bad_row : Status::no_such_row, bad};
  merge(scan.workers(), queries);
  return {Status::ok, 0};
}

}  // namespace geoengine::cpu
