#include <immintrin.h>

#include "tile.hpp"

namespace geoengine::cpu {
namespace {

struct V {
  static constexpr int rows = 4;
  static constexpr int queries = 4;
  __m512 lanes;

  static V zero() { return {_mm512_setzero_ps()}; }
  static V load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static V load(const float* from, std::int64_t count) {
    return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from)};
  }
  static V load(const std::uint16_t* from) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }
  static V load(const std::uint16_t* from, std::int64_t count) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << count) - 1), from))};
  }
};

V fma(V a, V b, V c) { return {_mm512_fmadd_ps(a.lanes, b.lanes, c.lanes)}; }

float sum(V v) {
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v.lanes), 1));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v.lanes), high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

}  // namespace

const Kernel avx512_kernel = {"avx512", score_strip<V, float>, score_strip<V, std::uint16_t>};

}  // namespace geoengine::cpu
