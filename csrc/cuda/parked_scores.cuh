// Scores parked in the memory of the gradient of the centers, in half precision: a float per pair, whose three lowest
// bits are its slot. The class's row of the gradient holds them from the forward to the backward's first pass, which
// overwrites them with H.
#pragma once
#include "scores.cuh"

namespace gistops::cuda {

constexpr int kMostParkedSlots = 8;

// Round z to 21 bits and add the slot. An infinity stays one, and a NaN that can_be_parked() returned a NaN.
__device__ __forceinline__ uint32_t parked(float z, uint32_t slot) { return ((__float_as_uint(z) + 4) & ~7u) | slot; }

// Return z, or for a NaN one that rounding does not turn into a number.
template <class S>
__device__ __forceinline__ S can_be_parked(S z) {
  if constexpr (sizeof(S) == 4) return z != z ? __uint_as_float(0x7fc00000u) : z;
  return z;
}
__device__ __forceinline__ float parked_score(uint32_t bits) { return __uint_as_float(bits & ~7u); }
__device__ __forceinline__ uint32_t parked_slot(uint32_t bits) { return bits & 7; }

// Store four scores of a class to z_to: with their slots, or beside them unless slots_to is null.
template <bool kParked, class S>
__device__ __forceinline__ void store_scores(S* z_to, uint8_t* slots_to, const S (&z)[4], const int (&slot)[4]) {
  if constexpr (kParked) {
    alignas(16) uint32_t values[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) values[e] = parked(z[e], static_cast<uint32_t>(slot[e]));
    *reinterpret_cast<uint4*>(z_to) = *reinterpret_cast<const uint4*>(values);
  } else {
    store_sums<true>(z_to, 0, 0, z);
    if (!slots_to) return;
    uint32_t bytes = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) bytes |= static_cast<uint32_t>(slot[e]) << (8 * e);
    *reinterpret_cast<uint32_t*>(slots_to) = bytes;
  }
}

}  // namespace gistops::cuda
