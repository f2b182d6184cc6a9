// Definitions that all kernels share: launch syntax, dynamic shared memory, number types.
// Without nvcc these files compile for the host; tests/host_cuda/shim then replaces the CUDA runtime.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#ifdef __CUDACC__
#define GISTOPS_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define GISTOPS_ALIGNED_SHARED(alignment, type, name) \
  extern __shared__ __align__(alignment)              \
  unsigned char raw_##alignment##_[];                 \
  type* name = reinterpret_cast<type*>(raw_##alignment##_)
#else
#define GISTOPS_LAUNCH(kernel, grid, block, shared, stream, ...) \
  host_cuda::launch(grid, block, shared, stream, kernel, __VA_ARGS__)
#define GISTOPS_ALIGNED_SHARED(alignment, type, name) type* name = reinterpret_cast<type*>(host_cuda::dynamic_shared())
#endif
#define GISTOPS_DYNAMIC_SHARED(type, name) GISTOPS_ALIGNED_SHARED(128, type, name)

namespace gistops::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

constexpr int kWarp = 32;

// True if nvcc fits the kernels that test this flag into 128 registers: for Hopper, but for no other target.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ != 900
constexpr bool kFitsIn128Registers = false;
#else
constexpr bool kFitsIn128Registers = true;
#endif

// N elements that one instruction reads or writes.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
  T e[N];
};

// The type of sums, norms and logits: double for double operands, else float.
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

// Return |x|. In host code an unqualified abs is the integer function.
template <class S>
__device__ __forceinline__ S magnitude(S x) {
  return x < S(0) ? -x : x;
}

// The reciprocal of a clamped norm. torch.nn.functional.normalize clamps norms at 1e-12.
template <class S>
__host__ __device__ constexpr S max_rnorm() {
  return S(1) / S(1e-12);
}

// Return 1 / max(|v|, 1e-12) for square = |v|^2, which rounding may leave below zero. NaN stays NaN, and a square that
// has overflowed gives NaN.
template <class S>
__device__ __forceinline__ S clamped_rnorm(S square) {
  const S norm = sqrt(square > S(0) || square != square ? square : S(0));
  if (norm < S(1e-12)) return max_rnorm<S>();
  return norm < kInfinity<S> ? S(1) / norm : norm - norm;
}

// Return tau, of magnitude 1e-20 at least: the backward finds the cosine of a logit by division.
template <class S>
__device__ __forceinline__ S load_tau(const S* tau) {
  const S value = *tau;
  return magnitude(value) < S(1e-20) ? (value < S(0) ? S(-1e-20) : S(1e-20)) : value;
}

// Return true if square = |w|^2 + 2 w.delta + |delta|^2 has lost more digits to cancellation than the sum of a long
// vector loses to rounding. A cancelled pair (k, j) is computed from the elements of w_k + delta_j instead, and its
// reciprocal norm is stored with a minus sign, so that the backward finds it. A NaN, as the difference of two infinite
// squares is, counts as cancelled.
template <class S>
__device__ __forceinline__ bool cancels(S square, S w_square, S delta_square) {
  return !(square >= (w_square + delta_square) * S(1.0 / 8));
}

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace gistops::cuda
