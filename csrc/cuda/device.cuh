// What all kernels share: launching, dynamic shared memory, number types.
// Without nvcc these files compile for the host, where tests/host_cuda/shim stands in for the CUDA runtime.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define GISTOPS_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define GISTOPS_DYNAMIC_SHARED(type, name)               \
  extern __shared__ __align__(128) unsigned char raw_[]; \
  type* name = reinterpret_cast<type*>(raw_)
#else
#define GISTOPS_LAUNCH(kernel, grid, block, shared, stream, ...) \
  host_cuda::launch(grid, block, shared, stream, kernel, __VA_ARGS__)
#define GISTOPS_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(host_cuda::dynamic_shared())
#endif

namespace gistops::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr int kWarp = 32;

// Whether the compiler fits into 128 registers what it does not for other targets than Hopper.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr bool kSqueezes = false;
#else
constexpr bool kSqueezes = true;
#endif

// N elements, read or written at once.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T e[N];
};

// The type of sums, norms and logits: float, and double for double.
template <class T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <class T>
using Sum = typename SumOf<T>::type;

template <class S>
inline constexpr S kInfinity = std::numeric_limits<S>::infinity();

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ double wide(double x) { return x; }
__device__ __forceinline__ float wide(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float wide(f16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(Sum<T> x) {
  if constexpr (sizeof(T) == sizeof(Sum<T>)) {
    return x;
  } else if constexpr (__is_same(T, bf16)) {
    return __float2bfloat16(x);
  } else {
    return __float2half(x);
  }
}

// |x|; plain abs is that of int in host code.
template <class S>
__device__ __forceinline__ S magnitude(S x) {
  return x < S(0) ? -x : x;
}

// 1 / max(|v|, 1e-12) from |v|^2, as torch.nn.functional.normalize clamps. Rounding may leave |v|^2 below zero. NaN
// stays NaN.
template <class S>
__host__ __device__ constexpr S max_rnorm() {
  return S(1) / S(1e-12);
}

template <class S>
__device__ __forceinline__ S clamped_rnorm(S square) {
  const S norm = sqrt(square > S(0) || square != square ? square : S(0));
  return norm < S(1e-12) ? max_rnorm<S>() : S(1) / norm;
}

// Whether |w + delta|^2 = |w|^2 + 2 w.delta + |delta|^2 has lost more digits than the sum of a long vector does. Such a
// pair is computed from w + delta itself, and its reciprocal norm is stored with a minus sign, for the backward.
template <class S>
__device__ __forceinline__ bool cancels(S square, S w_square, S delta_square) {
  return square < (w_square + delta_square) * S(1.0 / 8);
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace gistops::cuda
