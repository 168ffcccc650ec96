#include "tile.hpp"

namespace geoengine::cpu {
namespace {

struct V {
  static constexpr int rows = 1;
  static constexpr int queries = 1;
  static constexpr int tall = 1;
  float lanes[kLanes];

  static V zero() { return {}; }

  template <class T>
  static V load(const T* from, std::int64_t count = kLanes) {
    V v = {};
    for (std::int64_t i = 0; i < count; ++i) v.lanes[i] = widen(from[i]);
    return v;
  }
};

// A processor without fused multiply-add computes this in software: slow, and still the same bits as the others.
V fma(const V& a, const V& b, V c) {
  for (std::int64_t i = 0; i < kLanes; ++i) c.lanes[i] = __builtin_fmaf(a.lanes[i], b.lanes[i], c.lanes[i]);
  return c;
}

void sum_four(const V* v, float* out) {
  for (int j = 0; j < 4; ++j) {
    V sums = v[j];
    for (std::int64_t half = kLanes / 2; half >= 1; half /= 2) {
      for (std::int64_t i = 0; i < half; ++i) sums.lanes[i] += sums.lanes[i + half];
    }
    out[j] = sums.lanes[0];
  }
}

struct I {
  static constexpr std::int64_t block = 16;
  static constexpr int rows = 1;
  static constexpr std::int32_t offset = 0;
  using Row = Padded<std::int8_t>;
  using Sum = std::int32_t;

  static Sum zero() { return 0; }
  static Row load(const std::int8_t* from, std::int64_t count = block) { return {from, count}; }
  static Sum add(Sum sum, const Row& row, const std::int8_t* query) {
    for (std::int64_t i = 0; i < block; ++i) sum += row.values[i] * query[i];
    return sum;
  }
  static std::int32_t total(Sum sum) { return sum; }
};

}  // namespace

const Kernel portable_kernel = make_kernel<V, I>("portable");

}  // namespace geoengine::cpu
