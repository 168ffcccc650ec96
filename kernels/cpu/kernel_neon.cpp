#include <arm_neon.h>

#include "tile.hpp"

namespace geoengine::cpu {
namespace {

struct V {
  static constexpr int rows = 2;
  static constexpr int queries = 2;
  static constexpr int tall = 2;
  float32x4_t lanes[4];

  static V zero() { return {{vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0), vdupq_n_f32(0)}}; }

  template <class T>
  static V load(const T* from) {
    return {{four(from), four(from + 4), four(from + 8), four(from + 12)}};
  }
  static V load(const std::int8_t* from) {
    const int8x16_t bytes = vld1q_s8(from);
    const int16x8_t low = vmovl_s8(vget_low_s8(bytes));
    const int16x8_t high = vmovl_s8(vget_high_s8(bytes));
    return {{wide(vget_low_s16(low)), wide(vget_high_s16(low)), wide(vget_low_s16(high)), wide(vget_high_s16(high))}};
  }
  template <class T>
  static V load(const T* from, std::int64_t count) {
    return load(Padded<T>(from, count).values);
  }

 private:
  static float32x4_t four(const float* from) { return vld1q_f32(from); }
  static float32x4_t four(const Half* from) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const std::uint16_t*>(from))));
  }
  static float32x4_t four(const BFloat16* from) {
    const uint16x4_t bits = vld1_u16(reinterpret_cast<const std::uint16_t*>(from));
    return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(bits), 16));
  }
  static float32x4_t wide(int16x4_t values) { return vcvtq_f32_s32(vmovl_s16(values)); }
};

V fma(V a, V b, V c) {
  for (int i = 0; i < 4; ++i) c.lanes[i] = vfmaq_f32(c.lanes[i], a.lanes[i], b.lanes[i]);
  return c;
}

void sum_four(const V* v, float* out) {
  for (int i = 0; i < 4; ++i) {
    const float32x4_t* const lanes = v[i].lanes;
    const float32x4_t four = vaddq_f32(vaddq_f32(lanes[0], lanes[2]), vaddq_f32(lanes[1], lanes[3]));
    const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
    out[i] = vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
  }
}

struct I {
  static constexpr std::int64_t block = 16;
  static constexpr int rows = 4;
  static constexpr std::int32_t offset = 0;
  using Row = int8x16_t;
  using Sum = int32x4_t;

  static Sum zero() { return vdupq_n_s32(0); }
  static Row load(const std::int8_t* from) { return vld1q_s8(from); }
  static Row load(const std::int8_t* from, std::int64_t count) {
    return load(Padded<std::int8_t, block>(from, count).values);
  }
  static Sum add(Sum sum, Row row, const std::int8_t* query) {
    const Row other = load(query);
    sum = vpadalq_s16(sum, vmull_s8(vget_low_s8(row), vget_low_s8(other)));
    return vpadalq_s16(sum, vmull_s8(vget_high_s8(row), vget_high_s8(other)));
  }
  static std::int32_t total(Sum sum) { return vaddvq_s32(sum); }
};

}  // namespace

const Kernel neon_kernel = make_kernel<V, I>("neon");

}  // namespace geoengine::cpu
