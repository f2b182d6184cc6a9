// Scores parked in the memory of the gradient of the centers, in half precision: a float per pair, whose three lowest
// bits are its slot. The class's row of the gradient holds them from the forward to the backward's first pass, which
// overwrites them with H.
#pragma once
#include "scores.cuh"

namespace gistops::cuda {

constexpr int kMostParkedSlots = 8;

// Round z to 21 bits and add the slot. An infinity stays one, and a NaN a NaN.
__device__ __forceinline__ uint32_t parked(float z, uint32_t slot) {
  const uint32_t bits = z != z ? 0x7fc00000u : __float_as_uint(z);
  return ((bits + 4) & ~7u) | slot;
}
__device__ __forceinline__ float parked_score(uint32_t bits) { return __uint_as_float(bits & ~7u); }
__device__ __forceinline__ uint32_t parked_slot(uint32_t bits) { return bits & 7; }

// Store a lane's scores of class k, from row i on: with their slots, or beside them unless
// `in.slots` is null.
template <bool kParked, class T>
__device__ __forceinline__ void store_scores(const ScoreInputs<T>& in, int k, int i, const Sum<T> (&z)[4],
                                             const int (&slot)[4]) {
  if (i >= in.ld) return;
  Sum<T>* to = in.products + k * in.score_class + i;
  if constexpr (kParked) {
    alignas(16) uint32_t values[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) values[e] = parked(z[e], static_cast<uint32_t>(slot[e]));
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(values);
  } else {
    store_sums<true>(to, 0, 0, z);
    if (!in.slots) return;
    uint32_t bytes = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) bytes |= static_cast<uint32_t>(slot[e]) << (8 * e);
    *reinterpret_cast<uint32_t*>(in.slots + k * in.slot_class + i) = bytes;
  }
}

}  // namespace gistops::cuda
