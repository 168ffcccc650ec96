#include <immintrin.h>

#include "tile.hpp"

namespace geoengine::cpu {
namespace {

__mmask16 first(std::int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

struct V {
  static constexpr int rows = 4;
  static constexpr int queries = 4;
  __m512 lanes;

  static V zero() { return {_mm512_setzero_ps()}; }
  static V load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static V load(const float* from, std::int64_t count) { return {_mm512_maskz_loadu_ps(first(count), from)}; }
  static V load(const Half* from) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }
  static V load(const Half* from, std::int64_t count) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(count), from))};
  }
  static V load(const BFloat16* from) { return wide(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
  static V load(const BFloat16* from, std::int64_t count) {
    return wide(_mm256_maskz_loadu_epi16(first(count), from));
  }
  static V load(const std::int8_t* from) { return wide(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); }
  static V load(const std::int8_t* from, std::int64_t count) {
    return wide(_mm_maskz_loadu_epi8(first(count), from));
  }

 private:
  static V wide(__m256i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
  }
  static V wide(__m128i bytes) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))}; }
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

const Kernel avx512_kernel = make_kernel<V>("avx512");

}  // namespace geoengine::cpu
