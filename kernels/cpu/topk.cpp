#include "topk.hpp"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <exception>
#include <limits>
#include <system_error>
#include <thread>

#include "best.hpp"
#include "kernel.hpp"
#include "numbers.hpp"

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

// Partial sums, so that the compiler may use vectors: the order of the additions is fixed.
double squared_length(const float* query, std::int64_t d) {
  constexpr std::int64_t kSums = 8;
  double sums[kSums] = {};
  std::int64_t c = 0;
  for (; c + kSums <= d; c += kSums) {
    for (std::int64_t i = 0; i < kSums; ++i) sums[i] += static_cast<double>(query[c + i]) * query[c + i];
  }
  for (std::int64_t i = 0; c + i < d; ++i) sums[i] += static_cast<double>(query[c + i]) * query[c + i];
  double square = 0.0;
  for (const double sum : sums) square += sum;
  return square;
}

// Returns the first query that is not finite, or -1.
std::int64_t prepare(const Queries& queries, std::int64_t d, PreparedQueries& out) {
  out.m = queries.m;
  out.stride = (d + kLanes - 1) / kLanes * kLanes;
  out.padded.assign(static_cast<std::size_t>(std::max<std::int64_t>(queries.m, 1) * out.stride), 0.0f);
  out.inverse_norm.assign(static_cast<std::size_t>(queries.m), 0.0f);
  for (std::int64_t j = 0; j < queries.m; ++j) {
    const float* const query = queries.data + j * d;
    const double square = squared_length(query, d);
    if (!std::isfinite(square)) return j;
    if (square == 0.0) continue;
    const int exponent = std::ilogb(std::sqrt(square));
    const double scale = std::ldexp(1.0, -exponent);
    float* const scaled = out.padded.data() + j * out.stride;
    for (std::int64_t c = 0; c < d; ++c) scaled[c] = static_cast<float>(query[c] * scale);
    out.inverse_norm[static_cast<std::size_t>(j)] = static_cast<float>(std::ldexp(1.0, exponent) / std::sqrt(square));
  }
  return -1;
}

float clamp(float score) { return std::min(std::max(score, -1.0f), 1.0f); }

std::int64_t bytes_of(RowType type) {
  switch (type) {
    case RowType::f32:
      return 4;
    case RowType::i8:
      return 1;
    default:
      return 2;
  }
}

auto strip_function(const Kernel& kernel, RowType type) {
  switch (type) {
    case RowType::f32:
      return kernel.f32;
    case RowType::f16:
      return kernel.f16;
    case RowType::bf16:
      return kernel.bf16;
    default:
      return kernel.i8;
  }
}

template <class T>
void widen_row(const void* row, double scale, std::vector<double>& values) {
  for (std::size_t c = 0; c < values.size(); ++c) values[c] = scale * widen(static_cast<const T*>(row)[c]);
}

// §2 Scan: each worker takes turns of consecutive positions and keeps its own k best per query.
struct Worker {
  std::vector<Best> best;       // [m]
  std::vector<float> products;  // [kStrip, max(m, 1)]
  std::vector<double> values;   // [d], where a row is computed in double
  std::int64_t bad_position = -1;
  std::exception_ptr error;
};

class Scan {
 public:
  Scan(const Kernel& kernel, const Rows& rows, const Candidates& candidates, const PreparedQueries& queries,
       std::int64_t k, std::int64_t threads)
      : rows_(rows),
        candidates_(candidates),
        queries_(queries),
        k_(k),
        score_strip_(strip_function(kernel, rows.type)) {
    row_bytes_ = rows.stride * bytes_of(rows.type);
    const std::int64_t strips = (candidates.count + kStrip - 1) / kStrip;
    const std::int64_t shares = (strips + threads - 1) / threads;
    const std::int64_t strip_bytes = kStrip * rows.d * bytes_of(rows.type);
    const std::int64_t fitting = kBytesPerTurn / std::max<std::int64_t>(strip_bytes, 1);
    positions_per_turn_ = kStrip * std::max<std::int64_t>(1, std::min(fitting, shares));
  }

  // Threads end here, so nothing may escape. After an error no new turn starts, but turns begun are finished:
  // all rows before a bad one have then been seen, and the lowest bad row is the same for any number of threads.
  void work(Worker& worker) noexcept {
    try {
      worker.best.assign(static_cast<std::size_t>(queries_.m), Best(static_cast<std::size_t>(k_)));
      worker.products.resize(static_cast<std::size_t>(kStrip * std::max<std::int64_t>(queries_.m, 1)));
      while (!stopped_) {
        const std::int64_t begin = next_position_.fetch_add(positions_per_turn_);
        if (begin >= candidates_.count) return;
        if (!take_turn(worker, begin, std::min(begin + positions_per_turn_, candidates_.count))) stopped_ = true;
      }
    } catch (...) {
      worker.error = std::current_exception();
      stopped_ = true;
    }
  }

  bool exists(std::int64_t position) const { return number(position) >= 0 && number(position) < rows_.n; }

 private:
  // The queries whose lists the positions from `begin` on belong to, and where they end.
  struct Part {
    std::int64_t begin;
    std::int64_t end;
    std::int64_t query;
    std::int64_t queries;
    std::int64_t list_begin;
  };

  bool take_turn(Worker& worker, std::int64_t begin, std::int64_t end) const {
    const std::int64_t* const segments = candidates_.segments;
    if (segments == nullptr) return scan(worker, {begin, end, 0, queries_.m, 0});
    std::int64_t query = std::upper_bound(segments, segments + queries_.m + 1, begin) - segments - 1;
    for (; begin < end; ++query) {
      const std::int64_t stop = std::min(end, segments[query + 1]);
      if (begin < stop && !scan(worker, {begin, stop, query, 1, segments[query]})) return false;
      begin = stop;
    }
    return true;
  }

  bool scan(Worker& worker, const Part& part) const {
    float squares[kStrip];
    Strip strip;
    strip.d = rows_.d;
    strip.queries = queries_.padded.data() + part.query * queries_.stride;
    strip.m = std::max<std::int64_t>(part.queries, 1);  // rows are checked even where no query asks
    strip.stride = queries_.stride;
    strip.products = worker.products.data();
    strip.squares = rows_.unit ? nullptr : squares;
    for (std::int64_t first = part.begin; first < part.end; first += kStrip) {
      strip.count = std::min(kStrip, part.end - first);
      for (std::int64_t r = 0; r < kStrip; ++r) {
        const std::int64_t position = first + std::min(r, strip.count - 1);
        if (!exists(position)) {
          worker.bad_position = position;
          return false;
        }
        strip.rows[r] = row(position);
      }
      score_strip_(strip);
      for (std::int64_t r = 0; r < strip.count; ++r) {
        const float* const products = strip.products + r * strip.m;
        const bool fine = rows_.unit ? offer_products(worker, part, first + r, products)
                                     : offer_cosines(worker, part, first + r, products, squares[r]);
        if (!fine) {
          worker.bad_position = first + r;
          return false;
        }
      }
    }
    return true;
  }

  // These return false when the row holds NaN or infinity.
  bool offer_cosines(Worker& worker, const Part& part, std::int64_t position, const float* products,
                     float square) const {
    const float scale = rows_.type == RowType::i8 ? rows_.scales[number(position)] : 1.0f;
    const bool trusted = square >= kSmallestSquare && std::isfinite(square) && std::isfinite(scale) && scale != 0.0f;
    if (!trusted) {
      double inverse_norm;
      if (!widen_into(worker, position, inverse_norm)) return false;
      for (std::int64_t j = 0; j < part.queries; ++j) {
        const double score = in_double(worker, part.query + j) * inverse_norm;
        offer(worker, part, j, position, clamp(static_cast<float>(score)));
      }
      return true;
    }
    const float inverse_norm = std::copysign(1.0f / std::sqrt(square), scale);
    for (std::int64_t j = 0; j < part.queries; ++j) {
      const float inverse_query = queries_.inverse_norm[static_cast<std::size_t>(part.query + j)];
      offer(worker, part, j, position, clamp(products[j] * inverse_norm * inverse_query));
    }
    return true;
  }

  bool offer_products(Worker& worker, const Part& part, std::int64_t position, const float* products) const {
    const float scale = rows_.type == RowType::i8 ? rows_.scales[number(position)] : 1.0f;
    double inverse_norm;
    if (part.queries == 0 && !std::isfinite(products[0] * scale)) return widen_into(worker, position, inverse_norm);
    for (std::int64_t j = 0; j < part.queries; ++j) {
      float score = products[j] * scale * queries_.inverse_norm[static_cast<std::size_t>(part.query + j)];
      if (!std::isfinite(score)) {
        if (!widen_into(worker, position, inverse_norm)) return false;
        constexpr double kLargest = std::numeric_limits<float>::max();
        score = static_cast<float>(std::clamp(in_double(worker, part.query + j), -kLargest, kLargest));
      }
      offer(worker, part, j, position, score);
    }
    return true;
  }

  void offer(Worker& worker, const Part& part, std::int64_t j, std::int64_t position, float score) const {
    worker.best[static_cast<std::size_t>(part.query + j)].offer(score, position - part.list_begin);
  }

  bool widen_into(Worker& worker, std::int64_t position, double& inverse_norm) const {
    worker.values.resize(static_cast<std::size_t>(rows_.d));
    switch (rows_.type) {
      case RowType::f32:
        widen_row<float>(row(position), 1.0, worker.values);
        break;
      case RowType::f16:
        widen_row<Half>(row(position), 1.0, worker.values);
        break;
      case RowType::bf16:
        widen_row<BFloat16>(row(position), 1.0, worker.values);
        break;
      case RowType::i8:
        widen_row<std::int8_t>(row(position), rows_.scales[number(position)], worker.values);
        break;
    }
    double square = 0.0;
    for (const double value : worker.values) square += value * value;
    inverse_norm = square > 0.0 ? 1.0 / std::sqrt(square) : 0.0;
    return std::isfinite(square);
  }

  // The product of the row in `values` and the query of length 1.
  double in_double(const Worker& worker, std::int64_t query) const {
    const float* const factors = queries_.padded.data() + query * queries_.stride;
    double product = 0.0;
    for (std::size_t c = 0; c < worker.values.size(); ++c) product += worker.values[c] * factors[c];
    return product * queries_.inverse_norm[static_cast<std::size_t>(query)];
  }

  std::int64_t number(std::int64_t position) const {
    return candidates_.rows != nullptr ? candidates_.rows[position] : position;
  }

  const void* row(std::int64_t position) const {
    return static_cast<const char*>(rows_.data) + number(position) * row_bytes_;
  }

  const Rows& rows_;
  const Candidates& candidates_;
  const PreparedQueries& queries_;
  std::int64_t k_;
  void (*score_strip_)(const Strip&);
  std::int64_t row_bytes_;
  std::int64_t positions_per_turn_;
  std::atomic<std::int64_t> next_position_{0};
  std::atomic<bool> stopped_{false};
};

std::int64_t choose_threads(const Rows& rows, const Candidates& candidates, std::int64_t m, std::int64_t asked) {
  const std::int64_t strips = std::max<std::int64_t>((candidates.count + kStrip - 1) / kStrip, 1);
  if (asked > 0) return std::min(asked, strips);
  const double pairs = static_cast<double>(candidates.count) * static_cast<double>(candidates.segments ? 1 : m);
  const double products = pairs * static_cast<double>(rows.d);
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
    const std::size_t place = static_cast<std::size_t>(j * queries.k);
    const std::size_t k = static_cast<std::size_t>(queries.k);
    for (std::size_t i = 0; i < k; ++i) {
      const bool filled = i < scored.size();
      queries.scores[place + i] = filled ? scored[i].score : -std::numeric_limits<float>::infinity();
      queries.indices[place + i] = filled ? scored[i].row : -1;
    }
  }
}

}  // namespace

Outcome cosine_topk(const Kernel& kernel, const Rows& rows, const Candidates& candidates, const Queries& queries,
                    std::int64_t threads) {
  PreparedQueries prepared;
  const std::int64_t bad_query = prepare(queries, rows.d, prepared);
  if (bad_query >= 0) return {Status::bad_query, bad_query};
  if (candidates.count == 0) return {Status::ok, 0};

  std::vector<Worker> workers(static_cast<std::size_t>(choose_threads(rows, candidates, queries.m, threads)));
  Scan scan(kernel, rows, candidates, prepared, queries.k, static_cast<std::int64_t>(workers.size()));
  run(scan, workers);

  std::int64_t bad = candidates.count;
  for (const Worker& worker : workers) {
    if (worker.error) std::rethrow_exception(worker.error);
    if (worker.bad_position >= 0) bad = std::min(bad, worker.bad_position);
  }
  if (bad < candidates.count) return {scan.exists(bad) ? Status::bad_row : Status::no_such_row, bad};
  merge(workers, queries);
  return {Status::ok, 0};
}

}  // namespace geoengine::cpu
