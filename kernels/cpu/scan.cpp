#include "scan.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>

#include "numbers.hpp"

namespace geoengine::cpu {
namespace {

// Bytes of rows that a thread takes at a time: a fraction of a millisecond of work.
constexpr std::int64_t kBytesPerTurn = 256 * 1024;

// Where there is less to do, turns are shorter: a thread that comes late should still find some.
constexpr std::int64_t kTurnsEach = 4;

// Consecutive rows are asked for this many bytes before they are multiplied.
constexpr std::int64_t kBytesAhead = 8192;

// Squared lengths in fp32 are trusted when finite and at least this: then no product has overflowed and what has
// underflowed is far below rounding. Other rows (zero, tiny, huge, not finite) are computed again in double.
constexpr float kSmallestSquare = 0x1p-60f;

constexpr float kLargest = std::numeric_limits<float>::max();

// NaN stays NaN.
float clamp(float score, float bound) {
  const float low = score < -bound ? -bound : score;
  return low > bound ? bound : low;
}

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

// How far a score of the scan in fp32 can lie from the exact one, as a share of the row's length.
//
// With u = 2^-24 and L = ceil(d / 16) + 4 roundings on the way of a product into the sum (its lane, then four levels
// of additions), the sum of the products r_i p_i is off by at most g sum |r_i p_i| <= g |r| |p|, g = L u / (1 - L u)
// (Higham, Accuracy and Stability, 3.1), and the squared length by the factor 1 +- g, hence its root by less. Root,
// reciprocal, the query's reciprocal length and two multiplications add a handful of u. Underflow is far below that in
// rows of a length that `quantize_row` gives a finite error. So 2 g + 8 u is enough; 56 u more pay for computing the
// bound itself in fp32.
float rounding_bound(std::int64_t d) {
  const double u = 0x1p-24;
  const double roundings = static_cast<double>((d + kLanes - 1) / kLanes + 4) * u;
  return static_cast<float>(2.0 * roundings / (1.0 - roundings) + 64.0 * u);
}

}  // namespace

Scan::Scan(const Kernel& kernel, const Rows& rows, const Int8Look* look, const Candidates& candidates,
           const PreparedQueries& queries, std::int64_t k, std::int64_t threads)
    : rows_(rows),
      look_(rows.d <= kInt8Widest ? look : nullptr),
      candidates_(candidates),
      queries_(queries),
      k_(k),
      score_strip_(strip_function(kernel, rows.type)),
      multiply_int8_(kernel.int8),
      row_bytes_(rows.stride * bytes_of(rows.type)),
      rounding_(rounding_bound(rows.d)),
      workers_(static_cast<std::size_t>(threads)) {
  if (look_ != nullptr) int8_queries_ = quantize(queries, rows.d);
  const std::int64_t strips = (candidates.count + kStrip - 1) / kStrip;
  const std::int64_t shares = (strips + kTurnsEach * threads - 1) / (kTurnsEach * threads);
  const std::int64_t strip_bytes = kStrip * rows.d * (look_ != nullptr ? 1 : bytes_of(rows.type));
  const std::int64_t fitting = kBytesPerTurn / std::max<std::int64_t>(strip_bytes, 1);
  positions_per_turn_ = kStrip * std::max<std::int64_t>(1, std::min(fitting, shares));
}

// Nothing may escape from a thread. After an error no new turn starts, but turns begun are finished: all rows before a
// bad one have then been seen, and the lowest bad row is the same for any number of threads.
void Scan::work(std::int64_t index) noexcept {
  Worker& worker = workers_[static_cast<std::size_t>(index)];
  try {
    const auto m = static_cast<std::size_t>(queries_.m);
    const auto strip = static_cast<std::size_t>(kStrip) * std::max<std::size_t>(m, 1);
    worker.best.assign(m, Best(static_cast<std::size_t>(k_)));
    worker.thresholds.assign(m, -std::numeric_limits<float>::infinity());
    worker.products.resize(strip);
    worker.scores.resize(strip);
    if (look_ != nullptr) worker.int8_products.resize(2 * strip);
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

bool Scan::take_turn(Worker& worker, std::int64_t begin, std::int64_t end) const {
  const auto pass = [&](const Part& part) {
    return look_ != nullptr && part.queries > 0 ? look_then_scan(worker, part) : scan(worker, part);
  };
  const std::int64_t* const segments = candidates_.segments;
  if (segments == nullptr) return pass({begin, end, 0, queries_.m, 0});
  std::int64_t query = std::upper_bound(segments, segments + queries_.m + 1, begin) - segments - 1;
  for (; begin < end; ++query) {
    const std::int64_t stop = std::min(end, segments[query + 1]);
    if (begin < stop && !pass({begin, stop, query, 1, segments[query]})) return false;
    begin = stop;
  }
  return true;
}

// §1 All rows in full.
bool Scan::scan(Worker& worker, const Part& part) const {
  Strip strip = strip_of(worker, part);
  std::int64_t positions[kStrip];
  for (std::int64_t first = part.begin; first < part.end; first += kStrip) {
    strip.count = std::min(kStrip, part.end - first);
    for (std::int64_t r = 0; r < kStrip; ++r) {
      positions[r] = first + std::min(r, strip.count - 1);
      if (!exists(positions[r])) {
        worker.bad_position = positions[r];
        return false;
      }
      strip.rows[r] = row(positions[r]);
    }
    if (candidates_.rows != nullptr) ask_for(first + kStrip, std::min(first + 2 * kStrip, part.end));
    if (!score(worker, part, strip, positions)) return false;
  }
  return true;
}

// Rows in no order: the processor cannot guess which come next.
void Scan::ask_for(std::int64_t begin, std::int64_t end) const {
  constexpr std::int64_t kLine = 64;
  const std::int64_t bytes = rows_.d * bytes_of(rows_.type);
  for (std::int64_t position = begin; position < end; ++position) {
    if (!exists(position)) return;
    const char* const start = static_cast<const char*>(row(position));
    for (std::int64_t byte = 0; byte < bytes; byte += kLine) __builtin_prefetch(start + byte);
  }
}

// §2 All rows in int8, and in full those whose score may still be among the k best.
bool Scan::look_then_scan(Worker& worker, const Part& part) const {
  Strip strip = strip_of(worker, part);
  Int8Strip look;
  look.d = rows_.d;
  look.ahead = candidates_.rows == nullptr ? kBytesAhead : 0;
  look.queries = int8_queries_.planes.data() + 2 * part.query * int8_queries_.stride;
  look.sums = int8_queries_.sums.data() + 2 * part.query;
  look.m = part.queries;
  look.stride = int8_queries_.stride;
  look.products = worker.int8_products.data();
  std::int64_t positions[kStrip];
  for (std::int64_t first = part.begin; first < part.end; first += kStrip) {
    look.count = std::min(kStrip, part.end - first);
    for (std::int64_t r = 0; r < kStrip; ++r) {
      const std::int64_t position = first + std::min(r, look.count - 1);
      if (!exists(position)) {
        worker.bad_position = position;
        return false;
      }
      look.rows[r] = look_->values + number(position) * look_->stride;
    }
    multiply_int8_(look);
    const std::uint32_t chosen = promising(worker, part, look, first);
    if (chosen == 0) continue;
    strip.count = 0;
    for (std::int64_t r = 0; r < look.count; ++r) {
      if (chosen >> r & 1) positions[strip.count++] = first + r;
    }
    for (std::int64_t r = 0; r < kStrip; ++r) strip.rows[r] = row(positions[std::min(r, strip.count - 1)]);
    if (!score(worker, part, strip, positions)) return false;
  }
  return true;
}

// Returns a bit for each row whose score may exceed the threshold of a query.
//
// Let r be a row, v its int8 values and s their scale, E >= |r - s v| its error and N = |r|; u the query of length 1,
// and w = a (q1 + q2 / 254) its int8 planes, D >= |u - w| their error. Then
//   r.u = s v.w + s v.(u - w) + (r - s v).u <= s v.w + (N + E) D + E,
// and the scan's score of the row, in units of N for cosines, lies at most F = rounding_bound above r.u. Computing the
// bound in fp32 is off by a few u of |s v| |w| <= (N + E)(1 + D), which F has room for. A bound that is not a number
// or infinite, where `quantize_row` gave up, rules nothing out.
std::uint32_t Scan::promising(Worker& worker, const Part& part, const Int8Strip& strip, std::int64_t first) const {
  float scale[kStrip];
  float error[kStrip];
  float reach[kStrip];
  for (std::int64_t r = 0; r < kStrip; ++r) {
    const std::int64_t place = number(first + std::min(r, strip.count - 1));
    const float length = look_->lengths[place];
    const float unit = rows_.unit ? 1.0f : length > 0.0f ? 1.0f / length : 0.0f;
    scale[r] = look_->scales[place] * unit;
    error[r] = look_->errors[place] * unit;
    reach[r] = (length + 2.0f * look_->errors[place]) * unit;
  }
  std::uint32_t chosen = 0;
  for (std::int64_t j = 0; j < part.queries; ++j) {
    const auto query = static_cast<std::size_t>(part.query + j);
    const std::int32_t* const first_plane = strip.products + 2 * j * kStrip;
    const std::int32_t* const second_plane = first_plane + kStrip;
    const float factor = int8_queries_.factor[query];
    const float slack = int8_queries_.error[query] + rounding_;
    const float threshold = worker.thresholds[query];
    std::uint32_t ruled_out[kStrip];
    for (std::int64_t r = 0; r < kStrip; ++r) {
      const float product = static_cast<float>(first_plane[r]) +
                            static_cast<float>(second_plane[r]) * (1.0f / Int8Queries::kSecond);
      const float bound = factor * product * scale[r] + error[r] + reach[r] * slack;
      ruled_out[r] = bound <= threshold ? 1 : 0;
    }
    for (std::int64_t r = 0; r < kStrip; ++r) chosen |= (ruled_out[r] ^ 1u) << r;
  }
  return chosen & ((1u << strip.count) - 1);
}

// §3 A strip of rows in full: products, scores, and the offer to each query.
Strip Scan::strip_of(Worker& worker, const Part& part) const {
  Strip strip = {};
  strip.d = rows_.d;
  strip.ahead = candidates_.rows == nullptr ? kBytesAhead : 0;
  strip.queries = queries_.padded.data() + part.query * queries_.stride;
  strip.m = std::max<std::int64_t>(part.queries, 1);  // rows are checked even where no query asks
  strip.stride = queries_.stride;
  strip.products = worker.products.data();
  return strip;
}

// Returns false when a row holds NaN or infinity.
bool Scan::score(Worker& worker, const Part& part, const Strip& strip, const std::int64_t* positions) const {
  float squares[kStrip];
  std::fill_n(squares, kStrip, 1.0f);
  Strip job = strip;
  job.squares = rows_.unit ? nullptr : squares;
  score_strip_(job);
  float factors[kStrip];
  std::int32_t trusted[kStrip];
  for (std::int64_t r = 0; r < kStrip; ++r) {
    factors[r] = 1.0f / std::sqrt(squares[r]);
    trusted[r] = (squares[r] >= kSmallestSquare) & (squares[r] <= kLargest);
  }
  if (rows_.type == RowType::i8) {
    for (std::int64_t r = 0; r < job.count; ++r) {
      const float scale = rows_.scales[number(positions[r])];
      trusted[r] &= rows_.unit || (std::fabs(scale) <= kLargest && scale != 0.0f) ? 1 : 0;
      factors[r] = rows_.unit ? scale : std::copysign(factors[r], scale);
    }
  }
  const float* const inverse = queries_.inverse_norm.data() + part.query;
  float* const scores = worker.scores.data();
  const float bound = rows_.unit ? std::numeric_limits<float>::infinity() : 1.0f;
  if (job.m == 1) {
    for (std::int64_t r = 0; r < kStrip; ++r) scores[r] = clamp(job.products[r] * factors[r] * inverse[0], bound);
    if (rows_.unit) {
      for (std::int64_t r = 0; r < kStrip; ++r) trusted[r] &= std::fabs(scores[r]) <= kLargest;
    }
  } else {
    for (std::int64_t r = 0; r < job.count; ++r) {
      const float* const products = job.products + r * job.m;
      float* const row_scores = scores + r * job.m;
      std::int32_t finite = 1;
      for (std::int64_t j = 0; j < job.m; ++j) {
        row_scores[j] = clamp(products[j] * factors[r] * inverse[j], bound);
        finite &= std::fabs(row_scores[j]) <= kLargest;
      }
      if (rows_.unit) trusted[r] &= finite;
    }
  }
  for (std::int64_t r = 0; r < job.count; ++r) {
    if (trusted[r] == 0 && !score_in_double(worker, part, positions[r], scores + r * job.m)) {
      worker.bad_position = positions[r];
      return false;
    }
  }
  offer(worker, part, job, positions);
  return true;
}

void Scan::offer(Worker& worker, const Part& part, const Strip& strip, const std::int64_t* positions) const {
  float* const thresholds = worker.thresholds.data() + part.query;
  if (part.queries == 0) return;
  if (strip.m == 1) {
    std::int32_t hopeful = 0;
    for (std::int64_t r = 0; r < kStrip; ++r) hopeful |= worker.scores[static_cast<std::size_t>(r)] > thresholds[0];
    if (hopeful == 0) return;
  }
  for (std::int64_t r = 0; r < strip.count; ++r) {
    const float* const scores = worker.scores.data() + r * strip.m;
    int hopeful = 0;
    for (std::int64_t j = 0; j < part.queries; ++j) hopeful |= scores[j] > thresholds[j] ? 1 : 0;
    if (hopeful == 0) continue;
    for (std::int64_t j = 0; j < part.queries; ++j) {
      Best& best = worker.best[static_cast<std::size_t>(part.query + j)];
      best.offer(scores[j], positions[r] - part.list_begin);
      thresholds[j] = best.threshold();
    }
  }
}

// Scores that fp32 cannot be trusted with: all cosines of the row, or products that overflowed. A score must not
// depend on other queries. Returns false when the row holds NaN or infinity.
bool Scan::score_in_double(Worker& worker, const Part& part, std::int64_t position, float* scores) const {
  double inverse_norm;
  if (!widen_into(worker, position, inverse_norm)) return false;
  for (std::int64_t j = 0; j < part.queries; ++j) {
    const double product = in_double(worker, part.query + j);
    if (!rows_.unit) {
      scores[j] = clamp(static_cast<float>(product * inverse_norm), 1.0f);
    } else if (!(std::fabs(scores[j]) <= kLargest)) {
      scores[j] = static_cast<float>(std::clamp<double>(product, -kLargest, kLargest));
    }
  }
  return true;
}

bool Scan::widen_into(Worker& worker, std::int64_t position, double& inverse_norm) const {
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
double Scan::in_double(const Worker& worker, std::int64_t query) const {
  const float* const factors = queries_.padded.data() + query * queries_.stride;
  double product = 0.0;
  for (std::size_t c = 0; c < worker.values.size(); ++c) product += worker.values[c] * factors[c];
  return product * queries_.inverse_norm[static_cast<std::size_t>(query)];
}

}  // namespace geoengine::cpu
