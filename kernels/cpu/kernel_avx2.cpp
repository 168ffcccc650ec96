#include <immintrin.h>

#include "tile.hpp"

namespace geoengine::cpu {
namespace {

struct V {
  static constexpr int rows = 2;
  static constexpr int queries = 2;
  __m256 low;
  __m256 high;

  static V zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static V load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
  static V load(const std::uint16_t* from) { return {load_eight(from), load_eight(from + 8)}; }

  template <class T>
  static V load(const T* from, std::int64_t count) {
    alignas(32) T padded[kLanes] = {};
    for (std::int64_t i = 0; i < count; ++i) padded[i] = from[i];
    return load(padded);
  }

 private:
  static __m256 load_eight(const std::uint16_t* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
};

V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)}; }

float sum(V v) {
  const __m256 eight = _mm256_add_ps(v.low, v.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace

const Kernel avx2_kernel = {"avx2", score_strip<V, float>, score_strip<V, std::uint16_t>};

}  // namespace geoengine::cpu
