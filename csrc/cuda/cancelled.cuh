// The weights of cancelled pairs, which are not in H, for the kernels that add their terms.
#pragma once
#include "routing.cuh"
#include "scores.cuh"

namespace gistops::cuda {

// Return the weight of pair (k, i) if its slot is cancelled, else 0; set slot to the slot that won. Called by all lanes
// of a warp, each with its pair; a lane whose pair is not valid gets 0.
//
// If the scores are gone, all lanes compute those of one pair after another again, as the forward did, so that the same
// slots win.
template <class T>
__device__ __forceinline__ Sum<T> cancelled_weight(const GradSource<T>& in, int64_t k, int64_t i, bool valid,
                                                   int& slot) {
  using S = Sum<T>;
  slot = 0;
  if (!in.scores_gone) return valid ? in.cancelled_weight(k, i, slot) : S(0);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  bool candidate = false;
  for (int64_t j = 1; valid && j < in.p.M(); ++j) candidate |= in.center_rnorms[j * in.ldr + k] < S(0);
  S weight = 0;
  for (int other = 0; other < kWarp; ++other) {
    if (!__shfl_sync(~0u, static_cast<int>(candidate), other)) continue;
    const int64_t other_k = __shfl_sync(~0u, k, other), other_i = __shfl_sync(~0u, i, other);
    uint8_t best;
    const S z = score_cancelled_pair(in, other_k, other_i, lane, best);
    const S r = in.center_rnorms[best * in.ldr + other_k];
    if (lane == other) slot = best, weight = r < S(0) && best > 0 ? in.weight(k, i, r, z) : S(0);
  }
  return weight;
}

}  // namespace gistops::cuda
