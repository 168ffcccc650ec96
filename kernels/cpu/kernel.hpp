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
// a row. Memory `ahead` bytes further on is likely wanted next. Queries are zero-padded to `stride`, a multiple of
// kLanes. `products` is [kStrip, m] and `squares` is [kStrip] (squared lengths), or null where lengths are not wanted;
// what lies past `count` is undefined.
struct Strip {
  const void* rows[kStrip];
  std::int64_t count;
  std::int64_t d;
  std::int64_t ahead;
  const float* queries;
  std::int64_t m;
  std::int64_t stride;
  float* products;
  float* squares;
};

// Bytes that an instruction set takes at a time; int8 queries are padded with zeros to a multiple.
constexpr std::int64_t kInt8Block = 64;

// Integer products, exact, of `count` <= kStrip rows of int8 with m >= 1 queries of two planes each; d <= kInt8Widest.
// `queries` is [m, 2, stride], `sums` [m, 2] their sums, `products` [m, 2, kStrip].
struct Int8Strip {
  const std::int8_t* rows[kStrip];
  std::int64_t count;
  std::int64_t d;
  std::int64_t ahead;
  const std::int8_t* queries;
  const std::int32_t* sums;
  std::int64_t m;
  std::int64_t stride;
  std::int32_t* products;
};

// Up to here a sum of products of a signed and an unsigned byte fits in 32 bits.
constexpr std::int64_t kInt8Widest = 65536;

struct Kernel {
  const char* name;
  void (*f32)(const Strip&);
  void (*f16)(const Strip&);
  void (*bf16)(const Strip&);
  void (*i8)(const Strip&);
  void (*int8)(const Int8Strip&);
};

extern const Kernel portable_kernel;
extern const Kernel avx2_kernel;         // AVX2, FMA, F16C
extern const Kernel avx512_kernel;       // AVX-512 F, BW, VL
extern const Kernel avx512_vnni_kernel;  // and VNNI
extern const Kernel neon_kernel;         // what every 64-bit ARM has

}  // namespace geoengine::cpu
