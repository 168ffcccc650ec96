#include "tile.hpp"

namespace geoengine::cpu {
namespace {

struct V {
  static constexpr int rows = 1;
  static constexpr int queries = 1;
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

float sum(V v) {
  for (std::int64_t half = kLanes / 2; half >= 1; half /= 2) {
    for (std::int64_t i = 0; i < half; ++i) v.lanes[i] += v.lanes[i + half];
  }
  return v.lanes[0];
}

}  // namespace

const Kernel portable_kernel = make_kernel<V>("portable");

}  // namespace geoengine::cpu
