// Stands in for CUDA's header of this name: float16 as far as the kernels use it. The compiler's own type rounds to the
// nearest, ties to even.
#pragma once
#include "cuda_runtime.h"

struct __half {
  _Float16 value;
};

inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half(float x) { return {static_cast<_Float16>(x)}; }
