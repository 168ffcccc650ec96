// The seam between the scan over rows and the instruction sets that compute its products.
#pragma once

#include <cstdint>

namespace geoengine::cpu {

// Every instruction set adds products in the same order, in this many partial sums, with fused multiply-add:
// all of them give the same bits.
constexpr std::int64_t kLanes = 16;

// Rows that one call computes; a multiple of every kernel's tile height.
constexpr std::int64_t kStrip = 16;

// Products of `count` <= kStrip rows with m >= 1 queries. All kStrip pointers are readable: those past `count` repeat
// a row. Queries are zero-padded to `stride`, a multiple of kLanes. `products` is [kStrip, m] and `squares` is
// [kStrip] (squared lengths), or null where lengths are not wanted; what lies past `count` is undefined.
struct Strip {
  const void* rows[kStrip];
  std::int64_t count;
  std::int64_t d;
  const float* queries;
  std::int64_t m;
  std::int64_t stride;
  float* products;
  float* squares;
};

struct Kernel {
  const char* name;
  void (*f32)(const Strip&);
  void (*f16)(const Strip&);
  void (*bf16)(const Strip&);
  void (*i8)(const Strip&);
};

extern const Kernel portable_kernel;
extern const Kernel avx2_kernel;    // AVX2, FMA, F16C
extern const Kernel avx512_kernel;  // AVX-512 F, BW, VL
extern const Kernel neon_kernel;    // what every 64-bit ARM has

}  // namespace geoengine::cpu
