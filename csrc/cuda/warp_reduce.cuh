// Sums of many values over a warp.
#pragma once
#include "device.cuh"

namespace gistops::cuda {

// The sum over a warp, in every lane; the same bits in each, as both sides of an exchange add the same two numbers.
template <class S>
__device__ __forceinline__ S warp_sum(S x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

// Eight values a lane -> the sum over the warp of value `lane / 4`, by halving exchanges: 9 shuffles for 40.
template <class S>
__device__ __forceinline__ S halving_sum(const S (&x)[8], int lane) {
  S four[4], two[2];
  const bool upper = lane & 16, middle = lane & 8, lower = lane & 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const S kept = upper ? x[i + 4] : x[i], given = upper ? x[i] : x[i + 4];
    four[i] = kept + __shfl_xor_sync(~0u, given, 16);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const S kept = middle ? four[i + 2] : four[i], given = middle ? four[i] : four[i + 2];
    two[i] = kept + __shfl_xor_sync(~0u, given, 8);
  }
  S one = (lower ? two[1] : two[0]) + __shfl_xor_sync(~0u, lower ? two[0] : two[1], 4);
  one += __shfl_xor_sync(~0u, one, 2);
  return one + __shfl_xor_sync(~0u, one, 1);
}

}  // namespace gistops::cuda
