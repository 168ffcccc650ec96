#pragma once

#include <cuda_runtime_api.h>

struct __half2 {
  _Float16 x, y;
};
inline float2 __half22float2(__half2 pair) { return {static_cast<float>(pair.x), static_cast<float>(pair.y)}; }
