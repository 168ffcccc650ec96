#include <immintrin.h>

#include "tile.hpp"

namespace geoengine::cpu {
namespace {

struct V {
  static constexpr int rows = 2;
  static constexpr int queries = 2;
  static constexpr int tall = 4;
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

__attribute__((always_inline)) inline __m128 four_lanes(V v) {
  const __m256 eight = _mm256_add_ps(v.low, v.high);
  return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}

__attribute__((always_inline)) inline void sum_four(const V* v, float* out) {
  __m128 a = four_lanes(v[0]);
  __m128 b = four_lanes(v[1]);
  __m128 c = four_lanes(v[2]);
  __m128 d = four_lanes(v[3]);
  _MM_TRANSPOSE4_PS(a, b, c, d);
  _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(a, c), _mm_add_ps(b, d)));
}

struct I {
  static constexpr std::int64_t block = 16;
  static constexpr int rows = 4;
  static constexpr std::int32_t offset = 0;
  using Row = __m256i;
  using Sum = __m256i;

  static Sum zero() { return _mm256_setzero_si256(); }
  static Row load(const std::int8_t* from) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Row load(const std::int8_t* from, std::int64_t count) {
    return load(Padded<std::int8_t, block>(from, count).values);
  }
  static Sum add(Sum sum, Row row, const std::int8_t* query) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(row, load(query)));
  }
  static std::int32_t total(Sum sum) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
  }
};

}  // namespace

const Kernel avx2_kernel = make_kernel<V, I>("avx2");

}  // namespace geoengine::cpu
