#include <immintrin.h>

#include "tile.hpp"

namespace geoengine::cpu {
namespace {

__mmask16 first(std::int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

struct V {
  static constexpr int rows = 4;
  static constexpr int queries = 4;
  static constexpr int tall = 4;
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

__attribute__((always_inline)) inline __m128 four_lanes(V v) {
  const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v.lanes), 1));
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v.lanes), high);
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

std::int32_t total_of(__m512i sum) {
  const __m256i eight = _mm256_add_epi32(_mm512_castsi512_si256(sum), _mm512_extracti64x4_epi64(sum, 1));
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

#if defined(__AVX512VNNI__)

// The instruction multiplies unsigned with signed bytes: 128 is added to each of the row's.
struct I {
  static constexpr std::int64_t block = 64;
  static constexpr int rows = 4;
  static constexpr std::int32_t offset = 128;
  using Row = __m512i;
  using Sum = __m512i;

  static Sum zero() { return _mm512_setzero_si512(); }
  static Row load(const std::int8_t* from) { return shifted(_mm512_loadu_si512(from)); }
  static Row load(const std::int8_t* from, std::int64_t count) {
    return shifted(_mm512_maskz_loadu_epi8((std::uint64_t{1} << count) - 1, from));
  }
  static Sum add(Sum sum, Row row, const std::int8_t* query) {
    return _mm512_dpbusd_epi32(sum, row, _mm512_loadu_si512(query));
  }
  static std::int32_t total(Sum sum) { return total_of(sum); }

 private:
  static Row shifted(__m512i bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)); }
};

#else

struct I {
  static constexpr std::int64_t block = 32;
  static constexpr int rows = 4;
  static constexpr std::int32_t offset = 0;
  using Row = __m512i;
  using Sum = __m512i;

  static Sum zero() { return _mm512_setzero_si512(); }
  static Row load(const std::int8_t* from) {
    return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Row load(const std::int8_t* from, std::int64_t count) {
    return _mm512_cvtepi8_epi16(_mm256_maskz_loadu_epi8(static_cast<__mmask32>((1u << count) - 1), from));
  }
  static Sum add(Sum sum, Row row, const std::int8_t* query) {
    return _mm512_add_epi32(sum, _mm512_madd_epi16(row, load(query)));
  }
  static std::int32_t total(Sum sum) { return total_of(sum); }
};

#endif

}  // namespace

#if defined(__AVX512VNNI__)
const Kernel avx512_vnni_kernel = make_kernel<V, I>("avx512vnni");
#else
const Kernel avx512_kernel = make_kernel<V, I>("avx512");
#endif

}  // namespace geoengine::cpu
