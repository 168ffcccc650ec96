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

  template <class T>
  static V load(const T* from) {
    return {eight(from), eight(from + 8)};
  }
  template <class T>
  static V load(const T* from, std::int64_t count) {
    return load(Padded<T>(from, count).values);
  }

 private:
  static __m256 eight(const float* from) { return _mm256_loadu_ps(from); }
  static __m256 eight(const Half* from) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static __m256 eight(const BFloat16* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static __m256 eight(const std::int8_t* from) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
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

const Kernel avx2_kernel = make_kernel<V>("avx2");

}  // namespace geoengine::cpu
