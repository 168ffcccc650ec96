#include "topk.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <exception>
#include <system_error>
#include <thread>

#include "best.hpp"
#include "half.hpp"
#include "kernel.hpp"

namespace geoengine::cpu {
namespace {

// Starting a thread costs about as much as this many multiply-adds.
constexpr double kProductsPerThread = 4e6;

// Bytes of rows that a thread takes at a time: a fraction of a millisecond of work.
constexpr std::int64_t kBytesPerTurn = 256 * 1024;

// Squared lengths in fp32 are trusted when finite and at least this: then no product has overflowed and what has
// underflowed is far below rounding. Other rows (zero, tiny, huge, not finite) are computed again in double.
constexpr float kSmallestSquare = 0x1p-60f;

// §1 Queries: padded with zeros, and scaled by a power of two (exact) to a length near 1.
struct PreparedQueries {
  std::int64_t m;
  std::int64_t stride;
  std::vector<float> padded;        // [max(m, 1), stride]
  std::vector<float> inverse_norm;  // of the scaled query; 0 for a zero query, so that its scores are 0
};

// Returns the first query that is not finite, or -1.
std::int64_t prepare(const Queries& queries, std::int64_t d, PreparedQueries& out) {
  out.m = queries.m;
  out.stride = (d + kLanes - 1) / kLanes * kLanes;
  out.padded.assign(static_cast<std::size_t>(std::max<std::int64_t>(queries.m, 1) * out.stride), 0.0f);
  out.inverse_norm.assign(static_cast<std::size_t>(queries.m), 0.0f);
  for (std::int64_t j = 0; j < queries.m; ++j) {
    const float* const query = queries.data + j * d;
    double square = 0.0;
    for (std::int64_t c = 0; c < d; ++c) square += static_cast<double>(query[c]) * query[c];
    if (!std::isfinite(square)) return j;
    if (square == 0.0) continue;
    const int exponent = std::ilogb(std::sqrt(square));
    for (std::int64_t c = 0; c < d; ++c) {
      out.padded[static_cast<std::size_t>(j * out.stride + c)] = std::ldexp(query[c], -exponent);
    }
    out.inverse_norm[static_cast<std::size_t>(j)] = static_cast<float>(std::ldexp(1.0, exponent) / std::sqrt(square));
  }
  return -1;
}

float clamp(float score) { return std::min(std::max(score, -1.0f), 1.0f); }

// §2 Scan: each worker takes turns of consecutive rows and keeps its own k best per query.
struct Worker {
  std::vector<Best> best;       // [m]
  std::vector<float> products;  // [kStrip, max(m, 1)]
  std::int64_t bad_row = -1;
  std::exception_ptr error;
};

class Scan {
 public:
  Scan(const Kernel& kernel, const Rows& rows, const PreparedQueries& queries, std::int64_t k, std::int64_t threads)
      : rows_(rows), queries_(queries), k_(k) {
    score_strip_ = rows.type == RowType::f32 ? kernel.f32 : kernel.f16;
    row_bytes_ = rows.d * (rows.type == RowType::f32 ? 4 : 2);
    const std::int64_t strips = (rows.n + kStrip - 1) / kStrip;
    const std::int64_t shares = (strips + threads - 1) / threads;
    const std::int64_t fitting = kBytesPerTurn / std::max<std::int64_t>(kStrip * row_bytes_, 1);
    rows_per_turn_ = kStrip * std::max<std::int64_t>(1, std::min(fitting, shares));
  }

  // Threads end here, so nothing may escape. After an error no new turn starts, but turns begun are finished:
  // all rows before a bad one have then been seen, and the lowest bad row is the same for any number of threads.
  void work(Worker& worker) noexcept {
    try {
      worker.best.assign(static_cast<std::size_t>(queries_.m), Best(static_cast<std::size_t>(k_)));
      worker.products.resize(static_cast<std::size_t>(kStrip * std::max<std::int64_t>(queries_.m, 1)));
      while (!stopped_) {
        const std::int64_t begin = next_row_.fetch_add(rows_per_turn_);
        if (begin >= rows_.n) return;
        if (!take_turn(worker, begin, std::min(begin + rows_per_turn_, rows_.n))) stopped_ = true;
      }
    } catch (...) {
      worker.error = std::current_exception();
      stopped_ = true;
    }
  }

 private:
  bool take_turn(Worker& worker, std::int64_t begin, std::int64_t end) const {
    for (std::int64_t first = begin; first < end; first += kStrip) {
      const std::int64_t count = std::min(kStrip, end - first);
      float squares[kStrip];
      score_strip_({row(first), count, rows_.d, queries_.padded.data(), std::max<std::int64_t>(queries_.m, 1),
                    queries_.stride, worker.products.data(), squares});
      for (std::int64_t r = 0; r < count; ++r) {
        const bool trusted = squares[r] >= kSmallestSquare && std::isfinite(squares[r]);
        if (trusted) {
          offer(worker, first + r, worker.products.data() + r * queries_.m, 1.0f / std::sqrt(squares[r]));
        } else if (!offer_in_double(worker, first + r)) {
          worker.bad_row = first + r;
          return false;
        }
      }
    }
    return true;
  }

  void offer(Worker& worker, std::int64_t number, const float* products, float inverse_norm) const {
    for (std::int64_t j = 0; j < queries_.m; ++j) {
      const auto query = static_cast<std::size_t>(j);
      worker.best[query].offer(clamp(products[j] * inverse_norm * queries_.inverse_norm[query]), number);
    }
  }

  // Returns false when the row holds NaN or infinity.
  bool offer_in_double(Worker& worker, std::int64_t number) const {
    std::vector<double> values(static_cast<std::size_t>(rows_.d));
    double square = 0.0;
    for (std::int64_t c = 0; c < rows_.d; ++c) {
      double& value = values[static_cast<std::size_t>(c)];
      value = rows_.type == RowType::f32 ? static_cast<const float*>(row(number))[c]
                                         : half_to_float(static_cast<const std::uint16_t*>(row(number))[c]);
      square += value * value;
    }
    if (!std::isfinite(square)) return false;
    const double inverse_norm = square > 0.0 ? 1.0 / std::sqrt(square) : 0.0;
    for (std::int64_t j = 0; j < queries_.m; ++j) {
      const auto query = static_cast<std::size_t>(j);
      const float* const factors = queries_.padded.data() + j * queries_.stride;
      double product = 0.0;
      for (std::int64_t c = 0; c < rows_.d; ++c) product += values[static_cast<std::size_t>(c)] * factors[c];
      const double score = product * inverse_norm * queries_.inverse_norm[query];
      worker.best[query].offer(clamp(static_cast<float>(score)), number);
    }
    return true;
  }

  const void* row(std::int64_t number) const { return static_cast<const char*>(rows_.data) + number * row_bytes_; }

  const Rows& rows_;
  const PreparedQueries& queries_;
  std::int64_t k_;
  void (*score_strip_)(const Strip&);
  std::int64_t row_bytes_;
  std::int64_t rows_per_turn_;
  std::atomic<std::int64_t> next_row_{0};
  std::atomic<bool> stopped_{false};
};

std::int64_t choose_threads(const Rows& rows, std::int64_t m, std::int64_t asked) {
  const std::int64_t strips = std::max<std::int64_t>((rows.n + kStrip - 1) / kStrip, 1);
  if (asked > 0) return std::min(asked, strips);
  const double products = static_cast<double>(rows.n) * static_cast<double>(rows.d) * static_cast<double>(m);
  if (products < 2 * kProductsPerThread) return 1;
  const double cores = std::max(1u, std::thread::hardware_concurrency());
  return static_cast<std::int64_t>(std::min({products / kProductsPerThread, cores, static_cast<double>(strips)}));
}

void run(Scan& scan, std::vector<Worker>& workers) {
  std::vector<std::thread> threads;
  threads.reserve(workers.size());
  try {
    for (std::size_t i = 1; i < workers.size(); ++i) {
      threads.emplace_back([&scan, &worker = workers[i]]() noexcept { scan.work(worker); });
    }
  } catch (const std::system_error&) {
    // No more threads to be had: those that run take all the turns.
  }
  scan.work(workers[0]);
  for (std::thread& thread : threads) thread.join();
}

// §3 Merge: the k best of all workers' bests, in order.
void merge(const std::vector<Worker>& workers, const Queries& queries) {
  std::vector<Scored> scored;
  for (std::int64_t j = 0; j < queries.m; ++j) {
    scored.clear();
    for (const Worker& worker : workers) {
      if (worker.best.empty()) continue;  // its thread did not start
      const std::vector<Scored>& kept = worker.best[static_cast<std::size_t>(j)].kept();
      scored.insert(scored.end(), kept.begin(), kept.end());
    }
    keep_best(scored, static_cast<std::size_t>(queries.k));
    std::sort(scored.begin(), scored.end(), better);
    for (std::int64_t i = 0; i < queries.k; ++i) {
      queries.scores[j * queries.k + i] = scored[static_cast<std::size_t>(i)].score;
      queries.indices[j * queries.k + i] = scored[static_cast<std::size_t>(i)].row;
    }
  }
}

}  // namespace

Outcome cosine_topk(const Kernel& kernel, const Rows& rows, const Queries& queries, std::int64_t threads) {
  PreparedQueries prepared;
  const std::int64_t bad_query = prepare(queries, rows.d, prepared);
  if (bad_query >= 0) return {Status::bad_query, bad_query};
  if (rows.n == 0) return {Status::ok, 0};

  std::vector<Worker> workers(static_cast<std::size_t>(choose_threads(rows, queries.m, threads)));
  Scan scan(kernel, rows, prepared, queries.k, static_cast<std::int64_t>(workers.size()));
  run(scan, workers);

  std::int64_t bad_row = rows.n;
  for (const Worker& worker : workers) {
    if (worker.error) std::rethrow_exception(worker.error);
    if (worker.bad_row >= 0) bad_row = std::min(bad_row, worker.bad_row);
  }
  if (bad_row < rows.n) return {Status::bad_row, bad_row};
  merge(workers, queries);
  return {Status::ok, 0};
}

}  // namespace geoengine::cpu
