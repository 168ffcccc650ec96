// Rows of each dtype as 16-byte vectors, and sums across a warp.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "key.cuh"

namespace geoengine::cuda {

constexpr unsigned kWholeWarp = 0xffffffffu;
constexpr int kWarp = 32;

// One dtype: how it is stored, and how the four values that start at `slice` times four of a vector become floats.
struct Float32 {
  using Stored = float;
  __device__ static void unpack(const std::uint32_t (&words)[4], int, float (&x)[4]) {
    for (int i = 0; i < 4; ++i) x[i] = float_of(words[i]);
  }
};

struct Float16 {
  using Stored = std::uint16_t;
  __device__ static void unpack(const std::uint32_t (&words)[4], int slice, float (&x)[4]) {
    for (int i = 0; i < 2; ++i) {
      __half2 pair;
      std::memcpy(&pair, &words[2 * slice + i], sizeof pair);
      const float2 both = __half22float2(pair);
      x[2 * i] = both.x;
      x[2 * i + 1] = both.y;
    }
  }
};

struct BFloat16 {
  using Stored = std::uint16_t;
  __device__ static void unpack(const std::uint32_t (&words)[4], int slice, float (&x)[4]) {
    for (int i = 0; i < 2; ++i) {
      x[2 * i] = float_of(words[2 * slice + i] << 16);
      x[2 * i + 1] = float_of(words[2 * slice + i] & 0xffff0000u);
    }
  }
};

struct Int8 {
  using Stored = std::uint8_t;
  // The byte plus 128 in the lowest bits of 2^23 is a float: two cheap instructions where a conversion is a slow one.
  __device__ static void unpack(const std::uint32_t (&words)[4], int slice, float (&x)[4]) {
    const std::uint32_t shifted = words[slice] ^ 0x80808080u;
    for (int i = 0; i < 4; ++i) x[i] = float_of(0x4b000000u | ((shifted >> (8 * i)) & 0xffu)) - 8388736.0f;
  }
};

template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(typename T::Stored));

// Columns that a warp reads at a time; lane l holds kVector consecutive ones.
template <typename T>
constexpr int kStrip = kWarp * kVector<T>;

// 16 bytes of a row from `column` on, zeros past its end. Aligned rows start at multiples of 16 bytes, and so does
// their end; the values of others are fetched one by one.
template <typename T, bool kAligned>
__device__ inline void load(const typename T::Stored* row, int column, int d, std::uint32_t (&words)[4]) {
  for (int i = 0; i < 4; ++i) words[i] = 0;
  if (row == nullptr || column >= d) return;
  if (kAligned) {
    const uint4 vector = __ldg(reinterpret_cast<const uint4*>(row + column));
    words[0] = vector.x;
    words[1] = vector.y;
    words[2] = vector.z;
    words[3] = vector.w;
    return;
  }
  constexpr int kPerWord = 4 / static_cast<int>(sizeof(typename T::Stored));
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    if (column + i >= d) continue;
    std::uint32_t bits = 0;
    const typename T::Stored value = __ldg(row + column + i);
    std::memcpy(&bits, &value, sizeof value);
    words[i / kPerWord] |= bits << (i % kPerWord * 8 * static_cast<int>(sizeof value));
  }
}

// One value, for the few rows that are computed again in double.
template <typename T>
__device__ inline float value_at(const typename T::Stored* row, int column) {
  std::uint32_t words[4] = {0, 0, 0, 0};
  float x[4];
  const typename T::Stored value = __ldg(row + column);
  std::memcpy(&words[0], &value, sizeof value);
  T::unpack(words, 0, x);
  return x[0];
}

// Where shared memory holds a query's value for `column`: the floats that the lanes of a warp read together, four each,
// lie side by side, so that no two lanes meet in a bank.
template <typename T>
__host__ __device__ constexpr int query_slot(int column) {
  const int within = column % kStrip<T>;
  const int lane = within / kVector<T>;
  const int element = within % kVector<T>;
  return column - within + element / 4 * 4 * kWarp + lane * 4 + element % 4;
}

__device__ inline double warp_sum(double value) {
  for (int width = 1; width < kWarp; width *= 2) value += __shfl_xor_sync(kWholeWarp, value, width);
  return value;
}

// Sums each of N values over the warp's lanes, N a power of two up to 32; lane l gets the sum of v[l % N]. Halving the
// number of values at each step takes N - 1 shuffles where N sums would take 5 N. The lanes are added in the same order
// for any N: a row's score has the same bits whatever it is computed together with.
template <int N>
__device__ inline float sums_to_lanes(float (&v)[N], int lane) {
#pragma unroll
  for (int width = 1; width < kWarp; width *= 2) {
    if (width >= N) {
      v[0] += __shfl_xor_sync(kWholeWarp, v[0], width);
      continue;
    }
    const bool odd = (lane & width) != 0;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      if (i >= N / 2 / width) break;
      const float give = odd ? v[2 * i] : v[2 * i + 1];
      const float keep = odd ? v[2 * i + 1] : v[2 * i];
      v[i] = keep + __shfl_xor_sync(kWholeWarp, give, width);
    }
  }
  return v[0];
}

}  // namespace geoengine::cuda
