// One pass over the candidates, in turns that any number of threads take.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <vector>

#include "best.hpp"
#include "kernel.hpp"
#include "pool.hpp"
#include "queries.hpp"
#include "topk.hpp"

namespace geoengine::cpu {

// What one thread keeps: its own k best per query, and room for intermediate results.
struct Worker {
  std::vector<Best> best;         // [m]
  std::vector<float> thresholds;  // [m], those of `best`
  std::vector<float> products;    // [kStrip, max(m, 1)]
  std::vector<float> scores;      // [kStrip, max(m, 1)]
  std::vector<std::int32_t> int8_products;  // [m, 2, kStrip]
  std::vector<double> values;     // [d], where a row is computed in double
  std::int64_t bad_position = -1;
  std::exception_ptr error;
};

class Scan : public Job {
 public:
  Scan(const Kernel& kernel, const Rows& rows, const Int8Look* look, const Candidates& candidates,
       const PreparedQueries& queries, std::int64_t k, std::int64_t threads);
  virtual ~Scan() = default;

  void work(std::int64_t worker) noexcept override;

  const std::vector<Worker>& workers() const { return workers_; }
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

  bool take_turn(Worker& worker, std::int64_t begin, std::int64_t end) const;
  bool scan(Worker& worker, const Part& part) const;
  void ask_for(std::int64_t begin, std::int64_t end) const;
  bool look_then_scan(Worker& worker, const Part& part) const;
  std::uint32_t promising(Worker& worker, const Part& part, const Int8Strip& strip, std::int64_t first) const;
  Strip strip_of(Worker& worker, const Part& part) const;
  bool score(Worker& worker, const Part& part, const Strip& strip, const std::int64_t* positions) const;
  bool score_in_double(Worker& worker, const Part& part, std::int64_t position, float* scores) const;
  void offer(Worker& worker, const Part& part, const Strip& strip, const std::int64_t* positions) const;
  bool widen_into(Worker& worker, std::int64_t position, double& inverse_norm) const;
  double in_double(const Worker& worker, std::int64_t query) const;

  std::int64_t number(std::int64_t position) const {
    return candidates_.rows != nullptr ? candidates_.rows[position] : position;
  }
  const void* row(std::int64_t position) const {
    return static_cast<const char*>(rows_.data) + number(position) * row_bytes_;
  }

  const Rows& rows_;
  const Int8Look* look_;
  const Candidates& candidates_;
  const PreparedQueries& queries_;
  Int8Queries int8_queries_;
  std::int64_t k_;
  void (*score_strip_)(const Strip&);
  void (*multiply_int8_)(const Int8Strip&);
  std::int64_t row_bytes_;
  std::int64_t positions_per_turn_;
  float rounding_;
  std::vector<Worker> workers_;
  std::atomic<std::int64_t> next_position_{0};
  std::atomic<bool> stopped_{false};
};

}  // namespace geoengine::cpu
