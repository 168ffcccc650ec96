// The k best of a stream of scores whose row numbers ascend.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

namespace geoengine::cpu {

struct Scored {
  float score;
  std::int64_t row;
};

// A total order, since no score is NaN and no row comes twice: the k best do not depend on how rows were dealt out.
inline bool better(const Scored& a, const Scored& b) {
  return a.score > b.score || (a.score == b.score && a.row < b.row);
}

// Moves the k best to the front, in no order, and drops the rest.
inline void keep_best(std::vector<Scored>& scored, std::size_t k) {
  if (scored.size() <= k) return;
  std::nth_element(scored.begin(), scored.begin() + static_cast<std::ptrdiff_t>(k) - 1, scored.end(), better);
  scored.resize(k);
}

class Best {
 public:
  explicit Best(std::size_t k) : k_(k), capacity_(std::max<std::size_t>(2 * k, 64)) {}

  // A row that equals the k-th so far comes later, hence loses the tie.
  void offer(float score, std::int64_t row) {
    if (score > threshold_) insert(score, row);
  }

  // A score that is not above this is not among the k best.
  float threshold() const { return threshold_; }

  const std::vector<Scored>& kept() const { return kept_; }

 private:
  // Selecting among 2k once in every k insertions costs a constant per insertion.
  void insert(float score, std::int64_t row) {
    kept_.push_back({score, row});
    if (kept_.size() < capacity_) return;
    keep_best(kept_, k_);
    threshold_ = kept_[k_ - 1].score;
  }

  std::size_t k_;
  std::size_t capacity_;
  float threshold_ = -std::numeric_limits<float>::infinity();
  std::vector<Scored> kept_;
};

}  // namespace geoengine::cpu
