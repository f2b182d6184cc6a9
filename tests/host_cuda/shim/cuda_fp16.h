// Replaces CUDA's header of this name: the parts of float16 that the kernels use. The compiler's own type rounds to
// nearest, ties to even.
#pragma once
#include "cuda_runtime.h"

struct __half {
  _Float16 value;
};

inline float __half2float(__half x) { return static_cast<float>(x.value); }
inline __half __float2half(float x) { return {static_cast<_Float16>(x)}; }
