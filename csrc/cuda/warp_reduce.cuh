// Sums over the lanes of a warp, in a fixed order.
#pragma once
#include "device.cuh"

namespace gistops::cuda {

// Return the sum of x over the warp. Every lane gets the same bits, because both lanes of an exchange add the same two
// numbers.
template <class S>
__device__ __forceinline__ S warp_sum(S x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(~0u, x, lanes);
  return x;
}

// Sum eight values per lane over the warp; lane l returns the sum of x[l / 4]. Each exchange halves the number of
// values that a lane holds: 9 shuffles, where eight calls of warp_sum take 40.
template <class S>
__device__ __forceinline__ S warp_sum_of_8(const S (&x)[8], int lane) {
  S four[4], two[2];
  const bool upper = lane & 16, middle = lane & 8, lower = lane & 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const S kept = upper ? x[i + 4] : x[i], sent = upper ? x[i] : x[i + 4];
    four[i] = kept + __shfl_xor_sync(~0u, sent, 16);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const S kept = middle ? four[i + 2] : four[i], sent = middle ? four[i] : four[i + 2];
    two[i] = kept + __shfl_xor_sync(~0u, sent, 8);
  }
  S one = (lower ? two[1] : two[0]) + __shfl_xor_sync(~0u, lower ? two[0] : two[1], 4);
  one += __shfl_xor_sync(~0u, one, 2);
  return one + __shfl_xor_sync(~0u, one, 1);
}

// Sum kCount values per lane over the warp: lanes for which warp_sum_owner is true return the sum of
// x[warp_sum_index(lane)], in lanes of their own.
template <int kCount>
__device__ __forceinline__ bool warp_sum_owner(int lane) {
  return kCount == 1 ? lane == 0 : lane % 4 == 0 && lane / 4 < kCount;
}
template <int kCount>
__device__ __forceinline__ int warp_sum_index(int lane) {
  return kCount == 1 ? 0 : lane / 4;
}
template <int kCount, class S>
__device__ __forceinline__ S warp_sum_of(const S (&x)[kCount], int lane) {
  if constexpr (kCount == 1) {
    return warp_sum(x[0]);
  } else {
    S eight[8] = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) eight[i] = x[i];
    return warp_sum_of_8(eight, lane);
  }
}

}  // namespace gistops::cuda
